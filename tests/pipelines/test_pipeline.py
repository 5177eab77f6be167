"""The pipeline's call: classes, guidance, seeds, schedulers, callbacks, output."""

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from imagenet64_diffusion import ClassConditionalPipeline, EtaDDIMScheduler, LearnedVarianceDDPMScheduler
from imagenet64_diffusion.tests.components import make_pipeline, make_unet, seeded
from imagenet64_diffusion.tests.pipelines.gaussian_toy import make_gaussian_pipeline


@pytest.fixture
def pipeline() -> ClassConditionalPipeline:
    return make_pipeline()


def batch_sizes(pipeline) -> list[int]:
    """Those of each forward pass that follows."""
    sizes = []
    pipeline.unet.register_forward_pre_hook(lambda unet, arguments: sizes.append(len(arguments[0])))
    return sizes


@pytest.fixture
def batches(pipeline) -> list[int]:
    return batch_sizes(pipeline)


def generate(pipeline, labels=(0, 1, 2), seeds=None, steps=4, output_type="pt", **options):
    generators = seeded(*(range(len(labels)) if seeds is None else seeds))
    options = {"num_inference_steps": steps, "output_type": output_type, **options}
    return pipeline(list(labels), generator=generators, **options).images


def levels(images: torch.Tensor) -> np.ndarray:
    return (images * 255).round().numpy().astype(int)


class TestClasses:
    def test_ids_names_and_null(self, pipeline):
        by_id = generate(pipeline, [0, 0, 1, 3])
        assert torch.equal(by_id, generate(pipeline, ["tabby", "tabby, tabby cat", "goldfish", None]))
        assert pipeline.get_label_ids("tabby") == [0]
        assert pipeline.get_label_ids(["crane", "tabby cat"]) == [2, 0]
        assert pipeline.labels["goldfish"] == 1
        for label in (1, "goldfish", None, [1], torch.tensor([1])):
            assert len(pipeline(label, num_inference_steps=1).images) == 1

    def test_several_images_of_each(self, pipeline):
        images = pipeline([0, 1], 2, generator=seeded(0, 1, 2, 3), num_inference_steps=3, output_type="pt").images
        assert torch.equal(images, generate(pipeline, [0, 0, 1, 1], steps=3))

    def test_names_that_do_not_say_which_class(self):
        names = {0: "crane, bird", 1: "crane, machine", 2: "dog"}
        pipeline = ClassConditionalPipeline(make_unet(), EtaDDIMScheduler(), names)
        with pytest.raises(ValueError, match=r"'crane' stands for several.*0 \(crane, bird\) or 1 \(crane, mac"):
            pipeline.get_label_ids("crane")
        assert pipeline.get_label_ids("machine") == [1]
        assert "crane" not in pipeline.labels
        with pytest.raises(ValueError, match="no class names: give an id"):
            ClassConditionalPipeline(make_unet(), EtaDDIMScheduler())("tabby")

    def test_without_classes(self):
        pipeline = make_pipeline(num_class_embeds=None, layer_types=("resnet",))
        assert len(pipeline(num_images_per_label=3, num_inference_steps=2).images) == 3
        with pytest.raises(ValueError, match="the network has no classes: leave them None"):
            pipeline(1)


class TestGuidance:
    @pytest.mark.parametrize("guide_variance", [False, True])
    def test_formula(self, pipeline, guide_variance):
        """One step from given noise: null + g (conditional - null) for the prediction, the conditional variance."""
        scheduler = LearnedVarianceDDPMScheduler.from_config(pipeline.scheduler.config)
        pipeline.scheduler = scheduler
        pipeline.register_to_config(guide_variance=guide_variance)
        latents, labels = torch.randn(2, 1, 16, 16, generator=seeded(0)[0]), torch.tensor([0, 2])
        options = {"latents": latents, "timesteps": [500], "guidance_scale": 3.0, "output_type": "latent"}
        result = pipeline(labels, generator=seeded(5, 6), **options).images
        with torch.no_grad():
            conditional = pipeline.unet(latents, 500, labels).sample.double()
            null = pipeline.unet(latents, 500).sample.double()
        output = null + 3.0 * (conditional - null)
        if not guide_variance:
            output[:, 1:] = conditional[:, 1:]
        expected = scheduler.step(output.float(), 500, latents, generator=seeded(5, 6)).prev_sample
        torch.testing.assert_close(result, expected, atol=1e-4, rtol=1e-4)

    def test_how_many_branches(self, pipeline, batches):
        """One up to a scale of 1, both in one forward pass above; for the null class alone one."""
        conditional = generate(pipeline, guidance_scale=1.0)
        assert torch.equal(generate(pipeline, guidance_scale=0.5), conditional)
        generate(pipeline, guidance_scale=2.0)
        null = generate(pipeline, [None, None], guidance_scale=4.0)
        assert batches == [3] * 8 + [6] * 4 + [2] * 4
        # and in the company of classes it comes out the same
        mixed = generate(pipeline, [None, 1], guidance_scale=4.0)
        torch.testing.assert_close(mixed[:1], null[:1], atol=1e-4, rtol=1e-4)

    def test_interval(self):
        pipeline = make_gaussian_pipeline("cosine", sample_size=4)
        sizes = batch_sizes(pipeline)
        # 0.29 * 100 is less than 29 in floating point
        for interval in ((0.29, 0.57), (0.5, 0.5)):
            generate(pipeline, [0], steps=100, guidance_scale=2.0, guidance_interval=interval)
        assert sizes == [1] * 29 + [2] * 28 + [1] * 43 + [1] * 100

    def test_a_callback_changes_it(self, pipeline):
        """Guidance that a callback ends after half of the steps is that of the interval's first half."""

        def change(pipeline, step, timestep, tensors):
            if step == 1:
                pipeline._guidance_scale = 1.0

        changed = generate(pipeline, guidance_scale=2.0, callback_on_step_end=change)
        assert torch.equal(changed, generate(pipeline, guidance_scale=2.0, guidance_interval=(0.0, 0.5)))


class TestSeeds:
    @pytest.mark.parametrize("scheduler_class", [EtaDDIMScheduler, LearnedVarianceDDPMScheduler])
    def test_one_seed_one_image(self, pipeline, scheduler_class):
        """Whatever the batch size and the place: at most one 8-bit level apart, which float32 rounding may make."""
        pipeline.scheduler = scheduler_class.from_config(pipeline.scheduler.config)
        options = {"eta": 0.7} if scheduler_class is EtaDDIMScheduler else {}
        labels, seeds = [0, None, 1], [10, 11, 12]
        together = levels(generate(pipeline, labels, seeds, **options))
        assert together.std() > 10  # not blank
        alone = [generate(pipeline, labels[i : i + 1], seeds[i : i + 1], **options) for i in range(3)]
        backwards = generate(pipeline, labels[::-1], seeds[::-1], **options).flip(0)
        for others in (torch.cat(alone), backwards):
            assert np.abs(together - levels(others)).max() <= 1
        assert (levels(generate(pipeline, labels, [seed + 1 for seed in seeds], **options)) != together).any()

    def test_one_generator_for_all_and_given_latents(self, pipeline):
        options = {"num_inference_steps": 4, "output_type": "pt"}
        assert torch.equal(*(pipeline([0, 1], generator=seeded(0)[0], **options).images for _ in range(2)))
        latents = torch.cat([torch.randn(1, 1, 16, 16, generator=generator) for generator in seeded(0, 1, 2)])
        assert torch.equal(pipeline([0, 1, 2], latents=latents, **options).images, generate(pipeline))


class TestSchedulers:
    @pytest.mark.parametrize("variance_type", [None, "learned_range", "fixed_small", "fixed_large"])
    def test_stock_generates_what_ours_does(self, pipeline, variance_type):
        # a trained network keeps its variance in the range, where the two clamp alike
        torch.nn.init.normal_(pipeline.unet.head.conv.weight, std=0.03, generator=seeded(0)[0])
        stock = diffusers.DDIMScheduler
        if variance_type is not None:
            config, stock = pipeline.scheduler.config, diffusers.DDPMScheduler
            pipeline.scheduler = LearnedVarianceDDPMScheduler.from_config(config, variance_type=variance_type)
        ours = generate(pipeline, steps=10, output_type="latent")
        pipeline.scheduler = stock.from_config(pipeline.scheduler.config)
        torch.testing.assert_close(generate(pipeline, steps=10, output_type="latent"), ours, atol=1e-4, rtol=1e-4)

    def test_clipping(self, pipeline):
        as_configured = generate(pipeline, output_type="latent")
        assert torch.equal(generate(pipeline, clip_sample=False, output_type="latent"), as_configured)
        clipped = generate(pipeline, clip_sample=True, output_type="latent")
        assert clipped.abs().max() <= 1 + 1e-5 < as_configured.abs().max()
        assert pipeline.scheduler.config.clip_sample is False

    @pytest.mark.parametrize(
        ("scheduler", "options", "message"),
        [
            (diffusers.DDIMScheduler(), {"timesteps": [900, 50]}, "were given, but DDIMScheduler chooses its own"),
            (
                diffusers.UniPCMultistepScheduler(),
                {"clip_sample": True},
                "True, but UniPCMultistepScheduler has no such",
            ),
            (diffusers.DDPMScheduler(variance_type="learned"), {}, "but the network predicts 'learned_range'"),
        ],
    )
    def test_what_stock_cannot(self, pipeline, scheduler, options, message):
        pipeline.scheduler = scheduler
        with pytest.raises(ValueError, match=message):
            generate(pipeline, **options)

    def test_eta(self, pipeline, caplog):
        assert (generate(pipeline, eta=1.0) != generate(pipeline)).any()
        pipeline.scheduler = diffusers.UniPCMultistepScheduler.from_config(pipeline.scheduler.config)
        diffusers.utils.logging.enable_propagation()
        generate(pipeline, eta=0.5)
        diffusers.utils.logging.disable_propagation()
        assert "eta is 0.5, but UniPCMultistepScheduler takes no eta" in caplog.text


class TestOutput:
    def test_kinds(self, pipeline):
        tensors, arrays = generate(pipeline), generate(pipeline, output_type="np")
        assert tensors.shape == (3, 1, 16, 16)
        assert 0 <= tensors.min() < tensors.max() <= 1
        np.testing.assert_array_equal(arrays, tensors.permute(0, 2, 3, 1).numpy())
        pil_images = generate(pipeline, output_type="pil")
        assert all(isinstance(image, Image.Image) and image.size == (16, 16) for image in pil_images)
        np.testing.assert_array_equal(np.stack(pil_images), levels(tensors)[:, 0])
        latents = generate(pipeline, output_type="latent")
        torch.testing.assert_close((latents / 2 + 0.5).clamp(0, 1), tensors)
        assert isinstance(pipeline(0, num_inference_steps=1, return_dict=False), tuple)

    def test_channels(self):
        assert {image.mode for image in generate(make_pipeline(in_channels=3), output_type="pil")} == {"RGB"}
        pipeline = make_pipeline(in_channels=6)
        assert generate(pipeline).shape == (3, 6, 16, 16)
        with pytest.raises(
            ValueError, match="output_type is 'pil', but must be 'np' or 'pt' for images of 6 channels"
        ):
            generate(pipeline, output_type="pil")

    def test_half_precision_keeps_the_sample_in_float32(self, pipeline):
        expected = generate(pipeline, output_type="latent")
        latents = generate(pipeline.to(torch.bfloat16), output_type="latent")
        assert latents.dtype == torch.float32
        assert (latents - expected).norm() < 0.1 * expected.norm()


def test_a_callback_sees_replaces_and_interrupts(pipeline, batches, capsys):
    names, seen = ["latents", "model_output", "pred_original_sample"], []

    def callback(pipe, step, timestep, tensors):
        assert pipe is pipeline
        assert list(tensors) == names
        seen.append((step, int(timestep)))
        pipe._interrupt = step == 2
        return {"latents": torch.zeros_like(tensors["latents"])} if step == 2 else None

    options = {"callback_on_step_end": callback, "callback_on_step_end_tensor_inputs": names}
    assert not generate(pipeline, output_type="latent", **options).any()
    assert seen == list(enumerate(pipeline.scheduler.timesteps.tolist()))[:3]
    assert len(batches) == 3
    pipeline.set_progress_bar_config(disable=False)
    generate(pipeline, steps=7)
    assert "7/7" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"class_labels": "tabbi"}, "there is no class named 'tabbi'; did you mean 'tabby'"),
        ({"class_labels": 4}, "class label 4 is out of range: ids go from 0 to 2, and 3 or None is the null class"),
        ({"class_labels": []}, "class_labels is empty"),
        ({"num_images_per_label": 0}, "num_images_per_label is 0, but must be at least 1"),
        ({"guidance_interval": (0.5, 0.2)}, r"guidance_interval is \(0.5, 0.2\), but must be two fractions"),
        ({"output_type": "jpg"}, r"output_type is 'jpg', but must be one of \('pil', 'np', 'pt', 'latent'\)"),
        ({"generator": seeded(0, 1)}, "generator is a list of 2, but must be one, or of 1"),
        ({"latents": torch.zeros(2, 1, 16, 16)}, r"latents has shape \(2, 1, 16, 16\), but must be \(1, 1, 16, 16\)"),
        (
            {"callback_on_step_end_tensor_inputs": ["image"]},
            r"inputs is \['image'\], but must be of \['latents', 'model_o",
        ),
        ({"num_inference_steps": 1001}, "1001"),
        ({"eta": 2.0}, "eta"),
    ],
)
def test_wrong_arguments(pipeline, options, message):
    with pytest.raises(ValueError, match=message):
        pipeline(**{"class_labels": 0, "num_inference_steps": 2, **options})
