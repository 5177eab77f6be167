"""What every layer type promises, and the formulas of those that the original's answers do not fix."""

import math

import pytest
import torch

from imagenet64_diffusion.models.unet_class_conditional import LAYER_TYPES, StandardizedConv2d
from imagenet64_diffusion.tests.components import make_unet


class LayerContract:
    """The tests of a layer type: subclasses name it."""

    layer_type: str
    uses_time = False
    uses_class = False

    def make(self, in_channels=8, out_channels=8, **options):
        options = {"time_embed_dim": 6, "class_embed_dim": 5, "attention_patch_size": 4} | options
        config = make_unet(layer_types=("resnet",), **options).config
        torch.manual_seed(0)
        return LAYER_TYPES[self.layer_type](in_channels, out_channels, config).eval()

    def inputs(self, channels=8, size=8):
        generator = torch.Generator().manual_seed(1)
        return [torch.randn(3, *shape, generator=generator) for shape in ((channels, size, size), (6,), (5,))]

    def test_any_number_of_channels(self):
        widths = [(channels, channels) for channels in (1, 2, 3, 6, 7, 12, 24)]
        if LAYER_TYPES[self.layer_type].changes_width:
            widths += [(8, 16), (16, 8), (8, 6), (3, 8)]
        for in_channels, out_channels in widths:
            output = self.make(in_channels, out_channels)(*self.inputs(channels=in_channels))
            assert output.isfinite().all()
            assert output.shape == (3, out_channels, 8, 8)

    def test_images_do_not_see_one_another(self):
        inputs = self.inputs()
        layer = self.make()
        alone = torch.cat([layer(*(values[i : i + 1] for values in inputs)) for i in range(3)])
        torch.testing.assert_close(layer(*inputs), alone, atol=1e-5, rtol=1e-5)

    def test_listens_to_time_and_class_as_it_should(self):
        sample, time_embedding, class_embedding = self.inputs()
        layer = self.make()
        before = layer(sample, time_embedding, class_embedding)
        assert (layer(sample, time_embedding + 1, class_embedding) != before).any() == self.uses_time
        assert (layer(sample, time_embedding, class_embedding + 1) != before).any() == self.uses_class
        if not LAYER_TYPES[self.layer_type].needs_classes:
            assert self.make(num_class_embeds=None)(sample, time_embedding, None).shape == sample.shape


class TestResnet(LayerContract):
    layer_type = "resnet"
    uses_time = uses_class = True

    def test_dropout_only_in_training(self):
        inputs = self.inputs()
        layer = self.make(dropout=0.5)
        torch.testing.assert_close(layer(*inputs), self.make()(*inputs))
        assert (layer.train()(*inputs) != layer(*inputs)).any()


class TestConvNext(LayerContract):
    layer_type = "convnext"
    uses_time = uses_class = True


class TestClassAttention(LayerContract):
    layer_type = "class_attention"
    uses_class = True

    def test_formula(self):
        layer = self.make().double()
        sample, _, class_embedding = (values.double() for values in self.inputs())
        query, key = layer.query(class_embedding).detach(), layer.key(class_embedding).detach()
        normed = layer.norm(sample)
        mixed = torch.zeros_like(normed)
        for image in range(3):
            for c in range(8):
                row = torch.tensor([key[image, c] * query[image, d] / math.sqrt(8) for d in range(8)])
                weights = row.exp() / row.exp().sum()
                for d in range(8):
                    mixed[image, d] += weights[d] * normed[image, c]
        expected = layer.out_norm(layer.out_conv(mixed)) + sample
        torch.testing.assert_close(layer(sample, None, class_embedding), expected.detach(), atol=1e-9, rtol=1e-9)


class TestSelfAttention(LayerContract):
    layer_type = "self_attention"

    @pytest.mark.parametrize(("size", "patch"), [(4, 4), (4, 16), (8, 4), (8, 2)])
    def test_formula(self, size, patch):
        """Plain loops in float64: unfold by the patch size, read (channels, patches) as (patches, channels)."""
        layer = self.make(attention_patch_size=patch).double()
        sample = self.inputs(size=size)[0].double()
        edge = min(size, patch)

        def cut(features):
            patches = features.unfold(2, edge, edge).unfold(3, edge, edge)
            return patches.reshape(3, (size // edge) ** 2, 8, edge * edge)

        key, query, value = map(cut, layer.key_query_value(layer.norm(sample)).chunk(3, dim=1))
        attended = torch.zeros_like(value)
        for image in range(3):
            for p in range(value.shape[1]):
                scores = query[image, p].T @ key[image, p] / math.sqrt(patch)
                attended[image, p] = value[image, p] @ scores.softmax(dim=-1).T
        expected = layer.out_conv(attended.reshape(sample.shape)) + sample
        torch.testing.assert_close(layer(sample, None, None), expected, atol=1e-9, rtol=1e-9)

    def test_a_map_that_patches_do_not_cover(self):
        with pytest.raises(ValueError, match="attention_patch_size 4 does not divide a map of 6x6"):
            self.make()(torch.zeros(1, 8, 6, 6), None, None)


class TestChannelAttention(LayerContract):
    layer_type = "channel_attention"

    def test_kernel_sizes(self):
        """k = int(|log2(C) / 2 + 1 / 2|), made odd by adding one."""
        sizes = {2: 1, 6: 1, 8: 3, 64: 3, 128: 5, 1024: 5}
        assert {channels: self.make(channels, channels).conv.kernel_size[0] for channels in sizes} == sizes

    def test_formula(self):
        layer = self.make()
        sample = self.inputs()[0]
        kernel = layer.conv.weight.detach()[0, 0]
        means = torch.nn.functional.pad(sample.mean(dim=(2, 3)), (1, 1))
        logits = sum(kernel[offset] * means[:, offset : offset + 8] for offset in range(3))
        torch.testing.assert_close(layer(sample, None, None), sample * logits.sigmoid()[:, :, None, None])


def test_all_layer_types_have_a_contract():
    assert {test.layer_type for test in LayerContract.__subclasses__()} == set(LAYER_TYPES)


def test_standardized_convolution():
    torch.manual_seed(0)
    conv = StandardizedConv2d(3, 4, 3)
    with torch.no_grad():
        conv.weight.mul_(100).add_(5)
    weight = conv.weight.double()
    variance, mean = torch.var_mean(weight, (1, 2, 3), correction=0, keepdim=True)
    sample = torch.randn(2, 3, 8, 8).double()
    weight = (weight - mean) / (variance + 1e-5).sqrt()
    expected = torch.nn.functional.conv2d(sample, weight, conv.bias.double())
    torch.testing.assert_close(conv(sample.float()).double(), expected, atol=1e-5, rtol=1e-5)

    # a filter whose variance half precision cannot hold is standardised all the same
    with torch.no_grad():
        conv.weight.mul_(5e-4)
    expected, half = conv(sample.float()), conv.bfloat16()
    assert (half(sample.bfloat16()) - expected).abs().max() < 0.05 * expected.abs().max()
