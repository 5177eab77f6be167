"""Weights that are kept in the form in which they are used are never other weights than the network's."""

import copy
import pickle
import threading

import pytest
import torch
from diffusers.training_utils import EMAModel

from imagenet64_diffusion.models.unet_class_conditional import (
    CachedWeights,
    Conv2d,
    ConvTranspose2d,
    StandardizedConv2d,
)
from imagenet64_diffusion.tests.components import make_unet


ALL_LAYERS = ("resnet", "convnext", "class_attention", "self_attention", "channel_attention")


def inputs(batch=3, size=16):
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(batch, 1, size, size, generator=generator)
    return sample, torch.arange(batch) * 300, torch.arange(batch) % 4


@pytest.fixture
def unet():
    return make_unet(layer_types=ALL_LAYERS, attention_patch_size=8)


def answer(unet, *arguments):
    with torch.no_grad():
        return unet(*(arguments or inputs())).sample


def answer_of_fresh(unet, *arguments):
    """What a network with these weights says that has never kept any."""
    fresh = type(unet).from_config(unet.config).to(unet.dtype).eval()
    fresh.load_state_dict(unet.state_dict())
    return answer(fresh, *arguments)


def assert_right(unet):
    torch.testing.assert_close(answer(unet), answer_of_fresh(unet), rtol=0, atol=2e-5)


def is_empty(unet):
    return unet._cache_users is None and all(getattr(module, "cached", None) is None for module in unet.modules())


class TestTheSameAnswers:
    @pytest.mark.parametrize("head", ["conv", "original"])
    @pytest.mark.parametrize("attention", ["channel", "identity"])
    @pytest.mark.parametrize("size", [8, 16, (16, 32)])
    def test_of_every_layer(self, head, attention, size):
        unet = make_unet(
            layer_types=ALL_LAYERS,
            attention_patch_size=4,
            output_head_type=head,
            class_attention_type=attention,
            sample_size=size,
        )
        height, width = (size, size) if isinstance(size, int) else size
        sample = torch.randn(2, 1, height, width)
        timestep, labels = torch.tensor([3, 700]), torch.tensor([1, 3])
        # gradients asked for: the way of the training, which keeps nothing and has another memory layout
        expected = unet(sample, timestep, labels).sample.detach()
        with unet.cached_weights():
            torch.testing.assert_close(answer(unet, sample, timestep, labels), expected, rtol=0, atol=2e-5)

    def test_of_batches_and_sizes_that_change(self, unet):
        with unet.cached_weights():
            for batch, size in ((1, 16), (4, 16), (2, 32), (1, 16)):
                arguments = inputs(batch, size)
                torch.testing.assert_close(
                    answer(unet, *arguments), answer_of_fresh(unet, *arguments), rtol=0, atol=2e-5
                )

    def test_in_double_precision_and_bfloat16(self, unet):
        for dtype, tolerance in ((torch.float64, 1e-12), (torch.bfloat16, 0.0)):
            unet.to(dtype)
            sample, *others = inputs()
            arguments = (sample.to(dtype), *others)
            with unet.cached_weights():
                torch.testing.assert_close(
                    answer(unet, *arguments), answer_of_fresh(unet, *arguments), rtol=0, atol=tolerance
                )

    def test_under_autocast(self, unet):
        with torch.autocast("cpu", torch.bfloat16):
            expected = answer(unet)
            with unet.cached_weights():
                torch.testing.assert_close(answer(unet), expected, rtol=0, atol=0)
        with unet.cached_weights():
            answer(unet)
            with torch.autocast("cpu", torch.bfloat16):
                torch.testing.assert_close(answer(unet), expected, rtol=0.02, atol=0.02)

    @pytest.mark.parametrize("size", [(4, 4), (3, 5), (1, 2)])
    def test_of_the_transposed_convolution(self, size):
        conv = ConvTranspose2d(6, 6)
        images = torch.randn(2, 6, *size)
        expected = torch.nn.functional.conv_transpose2d(images, conv.weight, conv.bias, stride=2, padding=1)
        conv.cached = CachedWeights()
        with torch.no_grad():
            torch.testing.assert_close(conv(images), expected, rtol=0, atol=1e-5)
            assert len(conv.cached.weights) == 4

    @pytest.mark.parametrize("options", [{"stride": 2}, {"groups": 3}, {"bias": False}])
    def test_of_other_convolutions(self, options):
        conv = Conv2d(6, 6, 3, padding=1, **options)
        images = torch.randn(2, 6, 8, 8)
        expected = conv(images)
        conv.cached = CachedWeights()
        with torch.no_grad():
            torch.testing.assert_close(conv(images), expected, rtol=0, atol=1e-5)
            assert conv.cached.weights


class TestNeverStale:
    """Each of these changes the weights while the network keeps what it made of the old ones."""

    @staticmethod
    def scale_in_place(unet):
        with torch.no_grad():
            for parameter in unet.parameters():
                parameter.mul_(1.3)

    @staticmethod
    def optimizer_step(unet):
        optimizer = torch.optim.AdamW(unet.parameters(), lr=0.05)
        unet(*inputs()).sample.square().mean().backward()
        optimizer.step()

    @staticmethod
    def load(unet):
        unet.load_state_dict({name: 1.3 * value for name, value in unet.state_dict().items()})

    @staticmethod
    def load_by_assignment(unet):
        unet.load_state_dict({name: 1.3 * value for name, value in unet.state_dict().items()}, assign=True)

    @staticmethod
    def replace(unet):
        for module in unet.modules():
            if isinstance(module, torch.nn.Conv2d):
                module.weight = torch.nn.Parameter(1.3 * module.weight.detach())

    @staticmethod
    def move(unet):
        # there and back: new memory with the same values, then other ones
        unet.double().float()
        TestNeverStale.scale_in_place(unet)

    @pytest.mark.parametrize(
        "change", ["scale_in_place", "optimizer_step", "load", "load_by_assignment", "replace", "move"]
    )
    def test_when_weights_change_meanwhile(self, unet, change):
        with unet.cached_weights():
            before = answer(unet)
            getattr(self, change)(unet)
            assert_right(unet)
        assert (answer(unet) - before).abs().max() > 1e-3

    def test_when_the_moving_average_is_swapped_in_between(self, unet):
        """EMAModel writes through ``.data``, which leaves no trace on the weight."""
        average = EMAModel(unet.parameters(), decay=0.5)
        self.scale_in_place(unet)
        with unet.cached_weights():
            before = answer(unet)
        average.store(unet.parameters())
        average.copy_to(unet.parameters())
        with unet.cached_weights():
            assert (answer(unet) - before).abs().max() > 1e-3
            assert_right(unet)
        average.restore(unet.parameters())
        with unet.cached_weights():
            torch.testing.assert_close(answer(unet), before)

    def test_gradients_are_those_of_the_weights(self, unet):
        plain = copy.deepcopy(unet)
        plain(*inputs()).sample.square().mean().backward()
        with unet.cached_weights():
            answer(unet)
            unet(*inputs()).sample.square().mean().backward()
        for (name, parameter), other in zip(unet.named_parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(parameter.grad, other.grad, msg=name)

    @pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda unet: pickle.loads(pickle.dumps(unet))])
    def test_copies_keep_nothing(self, unet, duplicate):
        with unet.cached_weights():
            answer(unet)
            other = duplicate(unet)
        assert is_empty(other)
        for parameter in other.parameters():
            parameter.data.mul_(1.3)
        assert_right(other)
        with other.cached_weights():
            assert_right(other)
        assert is_empty(other)

    def test_in_inference_mode(self, unet):
        with torch.inference_mode():
            unet = copy.deepcopy(unet)
            with unet.cached_weights():
                before = answer(unet)
                torch.testing.assert_close(answer(unet), before, rtol=0, atol=0)


class TestTheTime:
    def test_ends_with_nothing_kept(self, unet):
        names = list(unet.state_dict())
        with unet.cached_weights():
            answer(unet)
            assert list(unet.state_dict()) == names
            assert unet.down_blocks[0].stack.layers[0].conv1.cached.weights
        assert is_empty(unet)

    def test_nests(self, unet):
        with unet.cached_weights():
            with unet.cached_weights():
                answer(unet)
            assert unet.conv_in.cached.weights
        assert is_empty(unet)

    def test_of_several_threads(self, unet):
        """Each with batches of its own, in times that overlap."""
        expected = {batch: answer_of_fresh(unet, *inputs(batch)) for batch in (1, 2, 3)}
        wrong = []

        def work(batch):
            for _ in range(5):
                with unet.cached_weights():
                    for _ in range(3):
                        distance = (answer(unet, *inputs(batch)) - expected[batch]).abs().max().item()
                        if distance > 2e-5:
                            wrong.append((batch, distance))

        threads = [threading.Thread(target=work, args=(batch,)) for batch in expected]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong
        assert is_empty(unet)

    def test_standardises_once(self, unet, monkeypatch):
        """Counted at the one function that all standardised weights come from."""
        calls = []
        used_weight = StandardizedConv2d.used_weight
        monkeypatch.setattr(StandardizedConv2d, "used_weight", lambda conv: calls.append(conv) or used_weight(conv))
        standardised = sum(isinstance(module, StandardizedConv2d) for module in unet.modules())
        with unet.cached_weights():
            for _ in range(3):
                answer(unet)
        assert len(calls) == standardised


class TestCompiling:
    """Traced as torch.compile traces, without the minutes that its compiler takes."""

    def test_without_graph_breaks_or_recompilation(self, unet):
        torch._dynamo.reset()
        compiled = torch.compile(unet, backend="aot_eager", fullgraph=True)
        sample, _, labels = inputs()
        with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
            for timestep in torch.tensor([999, 500, 0]):
                output = compiled(sample, timestep, labels).sample
                torch.testing.assert_close(output, answer(unet, sample, timestep, labels), rtol=0, atol=2e-5)

    def test_for_training(self, unet):
        torch._dynamo.reset()
        compiled = torch.compile(unet, backend="aot_eager", fullgraph=True)
        compiled(*inputs()).sample.square().mean().backward()
        gradients = [parameter.grad.clone() for parameter in unet.parameters()]
        unet.zero_grad()
        unet(*inputs()).sample.square().mean().backward()
        for gradient, parameter in zip(gradients, unet.parameters(), strict=True):
            torch.testing.assert_close(gradient, parameter.grad, rtol=1e-4, atol=1e-5)

    def test_while_weights_are_kept(self, unet):
        torch._dynamo.reset()
        compiled = torch.compile(unet, backend="aot_eager", fullgraph=True)
        expected = answer(unet)
        with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
            with unet.cached_weights():
                torch.testing.assert_close(compiled(*inputs()).sample, expected, rtol=0, atol=2e-5)
            torch.testing.assert_close(compiled(*inputs()).sample, expected, rtol=0, atol=2e-5)


class TestHalfPrecision:
    """On random networks, whose relative error is about that of trained ones."""

    @pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 0.03), (torch.float16, 0.004)])
    @pytest.mark.parametrize("layers", [("resnet",), ("resnet", "convnext"), ("resnet", "resnet", "self_attention")])
    def test_relative_error_of_the_prediction(self, dtype, bound, layers):
        unet = make_unet(
            stem_channels=32,
            block_out_channels=(64, 128),
            layer_types=(*layers, "class_attention", "channel_attention"),
            attention_patch_size=16,
        )
        sample, *others = inputs()
        expected = answer(unet.double(), sample.double(), *others)
        output = answer(unet.to(dtype), sample.to(dtype), *others)
        for part, reference in zip(output.chunk(2, dim=1), expected.chunk(2, dim=1), strict=True):
            assert (part.double() - reference).norm() / reference.norm() < bound
