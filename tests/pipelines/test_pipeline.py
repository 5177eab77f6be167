"""The pipeline's call: classes, guidance, seeds, schedulers, callbacks, output."""

import itertools

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from imagenet64_diffusion import ClassConditionalPipeline, EtaDDIMScheduler, LearnedVarianceDDPMScheduler
from imagenet64_diffusion.models.unet_class_conditional import StandardizedConv2d
from imagenet64_diffusion.tests.components import make_pipeline, make_unet, seeded


def generate(pipeline, labels=(0, 1, 2), seeds=None, steps=4, output_type="pt", **options):
    generators = seeded(*(range(len(labels)) if seeds is None else seeds))
    images = pipeline(
        list(labels), generator=generators, num_inference_steps=steps, output_type=output_type, **options
    ).images
    return images


class TestClasses:
    def test_ids_names_and_null(self):
        pipeline = make_pipeline()
        by_id = generate(pipeline, [0, 0, 1, 3])
        by_name = generate(pipeline, ["tabby", "tabby, tabby cat", "goldfish", None])
        assert torch.equal(by_id, by_name)

    def test_one_label_makes_one_image(self):
        pipeline = make_pipeline()
        for label in (1, "goldfish", None, [1], torch.tensor([1])):
            assert len(pipeline(label, num_inference_steps=1).images) == 1

    def test_several_images_of_each(self):
        pipeline = make_pipeline()
        images = pipeline([0, 1], 2, generator=seeded(0, 1, 2, 3), num_inference_steps=3, output_type="pt").images
        assert torch.equal(images, generate(pipeline, [0, 0, 1, 1], steps=3))

    def test_label_ids(self):
        pipeline = make_pipeline()
        assert pipeline.get_label_ids("tabby") == [0]
        assert pipeline.get_label_ids(["crane", "tabby cat"]) == [2, 0]
        assert pipeline.labels["goldfish"] == 1

    def test_a_name_of_two_classes(self):
        unet, scheduler = make_unet(), EtaDDIMScheduler()
        pipeline = ClassConditionalPipeline(unet, scheduler, {0: "crane, bird", 1: "crane, machine", 2: "dog"})
        with pytest.raises(
            ValueError, match=r"'crane' stands for several classes.*0 \(crane, bird\) or 1 \(crane, mac"
        ):
            pipeline.get_label_ids("crane")
        assert pipeline.get_label_ids("machine") == [1]
        assert "crane" not in pipeline.labels

    def test_without_classes(self):
        pipeline = make_pipeline(num_class_embeds=None, layer_types=("resnet",))
        assert len(pipeline(num_images_per_label=3, num_inference_steps=2).images) == 3

    def test_without_names(self):
        pipeline = ClassConditionalPipeline(make_unet(), EtaDDIMScheduler())
        with pytest.raises(ValueError, match="no class names: give an id"):
            pipeline("tabby")
        assert len(pipeline(2, num_inference_steps=1).images) == 1


class TestGuidance:
    def test_formula(self):
        """One step from given noise: null + g (conditional - null) for the prediction, the conditional variance."""
        pipeline = make_pipeline()
        pipeline.scheduler = LearnedVarianceDDPMScheduler.from_config(pipeline.scheduler.config)
        latents = torch.randn(2, 1, 16, 16, generator=seeded(0)[0])
        labels = torch.tensor([0, 2])
        for guide_variance in (False, True):
            pipeline.register_to_config(guide_variance=guide_variance)
            result = pipeline(
                labels, latents=latents, generator=seeded(5, 6), num_inference_steps=1, guidance_scale=3.0,
                output_type="latent", timesteps=[500],
            ).images  # fmt: skip
            with torch.no_grad():
                conditional = pipeline.unet(latents, 500, labels).sample.double()
                null = pipeline.unet(latents, 500).sample.double()
            output = null + 3.0 * (conditional - null)
            if not guide_variance:
                output[:, 1:] = conditional[:, 1:]
            scheduler = LearnedVarianceDDPMScheduler.from_config(pipeline.scheduler.config)
            scheduler.set_timesteps(timesteps=[500])
            expected = scheduler.step(output.float(), 500, latents, generator=seeded(5, 6)).prev_sample
            torch.testing.assert_close(result, expected, atol=1e-4, rtol=1e-4)

    @pytest.mark.parametrize("guidance_scale", [0.0, 0.5, 1.0])
    def test_up_to_one_is_the_conditional_branch_alone(self, guidance_scale):
        pipeline = make_pipeline()
        batches = count_images(pipeline)
        images = generate(pipeline, guidance_scale=guidance_scale)
        assert set(batches) == {3}
        assert torch.equal(images, generate(pipeline, guidance_scale=1.0))

    def test_both_branches_are_one_forward(self):
        pipeline = make_pipeline()
        batches = count_images(pipeline)
        generate(pipeline, guidance_scale=2.0)
        assert batches == [6] * 4

    def test_the_null_class_needs_one_branch(self):
        pipeline = make_pipeline()
        batches = count_images(pipeline)
        null = generate(pipeline, [None, None], guidance_scale=4.0)
        assert batches == [2] * 4
        # and in the company of classes it comes out the same
        mixed = generate(pipeline, [None, 1], guidance_scale=4.0)
        torch.testing.assert_close(mixed[:1], null[:1], atol=1e-4, rtol=1e-4)

    def test_interval(self):
        pipeline = make_pipeline()
        batches = count_images(pipeline)
        inside = generate(pipeline, steps=10, guidance_scale=2.0, guidance_interval=(0.2, 0.7))
        assert batches == [3] * 2 + [6] * 5 + [3] * 3
        assert (inside != generate(pipeline, steps=10, guidance_scale=2.0)).any()
        nowhere = generate(pipeline, steps=10, guidance_scale=2.0, guidance_interval=(0.5, 0.5))
        assert torch.equal(nowhere, generate(pipeline, steps=10, guidance_scale=1.0))

    def test_interval_in_hundredths(self):
        """0.29 * 100 is less than 29 in floating point."""
        pipeline = make_pipeline()
        batches = count_images(pipeline)
        generate(pipeline, [0], steps=100, guidance_scale=2.0, guidance_interval=(0.29, 0.57))
        assert batches == [1] * 29 + [2] * 28 + [1] * 43
        for k, steps in itertools.product(range(101), (10, 100, 250, 1000)):
            assert pipeline._guided_steps((0.0, k / 100), steps).stop == k * steps // 100

    def test_a_callback_changes_it(self):
        """Guidance that a callback ends after half of the steps is that of the interval's first half."""
        pipeline = make_pipeline()

        def end_guidance(pipeline, step, timestep, tensors):
            if step == 4:
                pipeline._guidance_scale = 1.0

        batches = count_images(pipeline)
        ended = generate(pipeline, steps=10, guidance_scale=2.0, callback_on_step_end=end_guidance)
        assert batches == [6] * 5 + [3] * 5
        assert torch.equal(ended, generate(pipeline, steps=10, guidance_scale=2.0, guidance_interval=(0.0, 0.5)))

        def begin_guidance(pipeline, step, timestep, tensors):
            if step == 4:
                pipeline._guidance_scale = 2.0

        begun = generate(pipeline, steps=10, guidance_scale=1.0, callback_on_step_end=begin_guidance)
        assert torch.equal(begun, generate(pipeline, steps=10, guidance_scale=2.0, guidance_interval=(0.5, 1.0)))


def count_images(pipeline) -> list[int]:
    """Fills a list with the batch size of each forward pass."""
    batches = []
    pipeline.unet.register_forward_pre_hook(lambda unet, arguments: batches.append(len(arguments[0])))
    return batches


class TestSeeds:
    @pytest.mark.parametrize("scheduler_class", [EtaDDIMScheduler, LearnedVarianceDDPMScheduler])
    def test_one_seed_one_image(self, scheduler_class):
        """Whatever the batch size and the place: at most one 8-bit level apart, which float32 rounding may make."""
        pipeline = make_pipeline()
        pipeline.scheduler = scheduler_class.from_config(pipeline.scheduler.config)
        options = {"eta": 0.7} if scheduler_class is EtaDDIMScheduler else {}
        labels, seeds = [0, 1, 2, 0, 1, 2, None, 1], [10, 11, 12, 13, 14, 15, 16, 17]
        together = levels(generate(pipeline, labels, seeds, **options))
        threes = np.concatenate(
            [levels(generate(pipeline, labels[i : i + 3], seeds[i : i + 3], **options)) for i in (0, 3, 6)]
        )
        alone = np.concatenate(
            [levels(generate(pipeline, [label], [seed], **options)) for label, seed in zip(labels, seeds, strict=True)]
        )
        backwards = levels(generate(pipeline, labels[::-1], seeds[::-1], **options))[::-1]
        assert together.std() > 10  # not blank
        for other in (threes, alone, backwards):
            assert np.abs(together - other).max() <= 1
        assert (levels(generate(pipeline, labels, [seed + 1 for seed in seeds], **options)) != together).any()

    def test_one_generator_for_all(self):
        pipeline = make_pipeline()
        images = [
            pipeline([0, 1], generator=seeded(0)[0], num_inference_steps=2, output_type="pt").images for _ in range(2)
        ]
        assert torch.equal(*images)

    def test_given_latents(self):
        pipeline = make_pipeline()
        latents = torch.cat([torch.randn(1, 1, 16, 16, generator=generator) for generator in seeded(0, 1, 2)])
        images = pipeline([0, 1, 2], latents=latents, num_inference_steps=4, output_type="pt").images
        assert torch.equal(images, generate(pipeline))


def levels(images: torch.Tensor) -> np.ndarray:
    return (images * 255).round().numpy().astype(int)


class TestSchedulers:
    def test_stock_ddim_generates_what_ours_does(self):
        pipeline = make_pipeline()
        ours = generate(pipeline, steps=10, output_type="latent")
        pipeline.scheduler = diffusers.DDIMScheduler.from_config(pipeline.scheduler.config)
        torch.testing.assert_close(generate(pipeline, steps=10, output_type="latent"), ours, atol=1e-4, rtol=1e-4)

    @pytest.mark.parametrize("variance_type", ["learned_range", "fixed_small", "fixed_large"])
    def test_stock_ddpm_generates_what_ours_does(self, variance_type):
        pipeline = make_pipeline()
        # a trained network keeps its variance in the range, where the two clamp alike
        torch.nn.init.normal_(pipeline.unet.head.conv.weight, std=0.03, generator=seeded(0)[0])
        pipeline.scheduler = LearnedVarianceDDPMScheduler.from_config(
            pipeline.scheduler.config, variance_type=variance_type
        )
        ours = generate(pipeline, steps=10, output_type="latent")
        pipeline.scheduler = diffusers.DDPMScheduler.from_config(pipeline.scheduler.config)
        torch.testing.assert_close(generate(pipeline, steps=10, output_type="latent"), ours, atol=1e-4, rtol=1e-4)

    def test_a_stock_scheduler_with_another_learned_variance(self):
        pipeline = make_pipeline()
        pipeline.scheduler = diffusers.DDPMScheduler(variance_type="learned")
        with pytest.raises(ValueError, match="variance_type is 'learned', but the network predicts 'learned_range'"):
            generate(pipeline)

    def test_own_timesteps(self):
        pipeline = make_pipeline()
        batches = count_images(pipeline)
        generate(pipeline, timesteps=[900, 400, 50])
        assert len(batches) == 3
        assert pipeline.num_timesteps == 3
        pipeline.scheduler = diffusers.DDIMScheduler.from_config(pipeline.scheduler.config)
        with pytest.raises(ValueError, match="timesteps were given, but DDIMScheduler chooses its own"):
            generate(pipeline, timesteps=[900, 400, 50])

    def test_clipping(self):
        pipeline = make_pipeline()
        as_configured = generate(pipeline, output_type="latent")
        assert torch.equal(generate(pipeline, clip_sample=False, output_type="latent"), as_configured)
        clipped = generate(pipeline, clip_sample=True, output_type="latent")
        assert clipped.abs().max() <= 1 + 1e-5
        assert as_configured.abs().max() > 1
        assert pipeline.scheduler.config.clip_sample is False
        pipeline.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
        with pytest.raises(
            ValueError, match="clip_sample is True, but DPMSolverMultistepScheduler has no such option"
        ):
            generate(pipeline, clip_sample=True)

    def test_eta(self, caplog):
        pipeline = make_pipeline()
        assert (generate(pipeline, eta=1.0) != generate(pipeline)).any()
        pipeline.scheduler = diffusers.UniPCMultistepScheduler.from_config(pipeline.scheduler.config)
        diffusers.utils.logging.enable_propagation()
        generate(pipeline, eta=0.5)
        diffusers.utils.logging.disable_propagation()
        assert "eta is 0.5, but UniPCMultistepScheduler takes no eta" in caplog.text


class TestOutput:
    def test_kinds(self):
        pipeline = make_pipeline()
        tensors = generate(pipeline)
        assert tensors.shape == (3, 1, 16, 16)
        assert tensors.min() >= 0
        assert tensors.max() <= 1
        arrays = generate(pipeline, output_type="np")
        assert arrays.shape == (3, 16, 16, 1)
        np.testing.assert_array_equal(arrays[..., 0], tensors[:, 0].numpy())
        pil_images = generate(pipeline, output_type="pil")
        assert all(isinstance(image, Image.Image) and image.size == (16, 16) for image in pil_images)
        np.testing.assert_array_equal(np.stack(pil_images), levels(tensors)[:, 0])
        latents = generate(pipeline, output_type="latent")
        torch.testing.assert_close((latents / 2 + 0.5).clamp(0, 1), tensors)
        assert isinstance(pipeline(0, num_inference_steps=1, return_dict=False), tuple)

    def test_colour(self):
        pil_images = generate(make_pipeline(in_channels=3), output_type="pil")
        assert {image.mode for image in pil_images} == {"RGB"}

    def test_more_channels_than_a_image_has(self):
        pipeline = make_pipeline(in_channels=6)
        assert generate(pipeline).shape == (3, 6, 16, 16)
        with pytest.raises(ValueError, match="'pil' cannot hold images of 6 channels: take 'np' or 'pt'"):
            generate(pipeline, output_type="pil")

    def test_half_precision_keeps_the_sample_in_float32(self):
        pipeline = make_pipeline()
        expected = generate(pipeline, output_type="latent")
        pipeline.to(torch.bfloat16)
        latents = generate(pipeline, output_type="latent")
        assert latents.dtype == torch.float32
        assert (latents - expected).norm() < 0.1 * expected.norm()


class TestCallback:
    def test_sees_and_replaces(self):
        pipeline = make_pipeline()
        seen = []

        def callback(pipe, step, timestep, tensors):
            assert pipe is pipeline
            assert set(tensors) == {"latents", "model_output", "pred_original_sample"}
            seen.append((step, int(timestep), tensors["pred_original_sample"].shape))
            return {"latents": torch.zeros_like(tensors["latents"])} if step == 3 else None

        latents = generate(
            pipeline,
            output_type="latent",
            callback_on_step_end=callback,
            callback_on_step_end_tensor_inputs=["latents", "model_output", "pred_original_sample"],
        )
        assert [step for step, _, _ in seen] == [0, 1, 2, 3]
        assert [timestep for _, timestep, _ in seen] == pipeline.scheduler.timesteps.tolist()
        assert not latents.any()

    def test_interrupts(self):
        pipeline = make_pipeline()
        steps = []

        def callback(pipe, step, timestep, tensors):
            steps.append(step)
            pipe._interrupt = step == 1

        generate(pipeline, callback_on_step_end=callback)
        assert steps == [0, 1]

    def test_progress_bar(self, capsys):
        pipeline = make_pipeline()
        pipeline.set_progress_bar_config(disable=False)
        generate(pipeline, steps=7)
        assert "7/7" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"class_labels": "tabbi"}, "there is no class named 'tabbi'; did you mean 'tabby'"),
        ({"class_labels": "zzz"}, "no class named 'zzz'; pipeline.labels lists all names"),
        ({"class_labels": 4}, "class label 4 is out of range: ids go from 0 to 2, and 3 or None is the null class"),
        ({"class_labels": -1}, "class label -1 is out of range"),
        ({"class_labels": []}, "class_labels is empty"),
        ({"num_images_per_label": 0}, "num_images_per_label is 0, but must be at least 1"),
        ({"guidance_interval": (0.5, 0.2)}, r"guidance_interval is \(0.5, 0.2\), but must be two fractions"),
        ({"guidance_interval": (0.0, 1.5)}, "guidance_interval"),
        ({"output_type": "jpg"}, "output_type is 'jpg', but must be one of pil, np, pt, latent"),
        ({"generator": seeded(0, 1)}, "generator is a list of 2, but must be one generator, or one for each of 1 im"),
        ({"latents": torch.zeros(2, 1, 16, 16)}, r"latents has shape \(2, 1, 16, 16\), but must be \(1, 1, 16, 16\)"),
        (
            {"callback_on_step_end_tensor_inputs": ["image"]},
            "names 'image', but must be made of latents, model_output",
        ),
        ({"num_inference_steps": 1001}, "1001"),
        ({"eta": 2.0}, "eta"),
    ],
)
def test_wrong_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        make_pipeline()(**{"class_labels": 0, "num_inference_steps": 2, **options})


def test_labels_for_a_network_without_classes():
    pipeline = make_pipeline(num_class_embeds=None, layer_types=("resnet",))
    with pytest.raises(ValueError, match="the network has no classes: leave them None"):
        pipeline(1)


def test_weights_written_to_between_calls():
    """As an EMA is swapped in: through .data, which leaves no trace on the weight."""
    pipeline, changed = make_pipeline(), make_pipeline()
    before = generate(pipeline)
    for network in (pipeline.unet, changed.unet):
        for parameter in network.parameters():
            parameter.data.mul_(1.2)
    after = generate(pipeline)
    assert (after - before).abs().max() > 1e-3
    torch.testing.assert_close(after, generate(changed), rtol=0, atol=0)


def test_weights_are_prepared_once_in_a_call_even_if_it_fails(monkeypatch):
    pipeline, prepared = make_pipeline(), []
    effective_weight = StandardizedConv2d.effective_weight
    monkeypatch.setattr(
        StandardizedConv2d, "effective_weight", lambda conv: prepared.append(conv) or effective_weight(conv)
    )

    def fail(_, step, *__):
        return {} if step == 0 else 1 / 0

    with pytest.raises(ZeroDivisionError):
        generate(pipeline, callback_on_step_end=fail)
    assert len(prepared) == len(set(prepared)) > 0
    assert not any("forward" in vars(module) for module in pipeline.unet.modules())
