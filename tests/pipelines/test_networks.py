"""The pipeline with networks of other kinds: stock, ADM's, EDM's and EDM2's, and what guides them."""

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, EDMEulerScheduler, UNet2DModel

from imagenet64_diffusion import (
    ADMClassifierModel,
    ADMUNet2DModel,
    ClassConditionalPipeline,
    EDM2UNet2DModel,
    EDMHeunScheduler,
    EtaDDIMScheduler,
    LearnedVarianceDDPMScheduler,
)
from imagenet64_diffusion.pipelines.loading import scheduler_names, swap_scheduler
from imagenet64_diffusion.tests.components import make_pipeline, make_unet, seeded


NAMES = {0: "cat", 1: "dog", 2: "crane"}
STOCK = {
    "sample_size": 16,
    "block_out_channels": (8, 16),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 4,
}
EDM2 = {"sample_size": 16, "model_channels": 8, "channel_mult": (1, 2), "layers_per_block": 1}
CLASSIFIER = {"num_classes": 3, "attention_head_dim": 8}
CLASSIFIER |= {name: value for name, value in STOCK.items() if name != "up_block_types"}
DDPM = {"prediction_type": "epsilon", "clip_sample": False}


def make_network(network_class: type, seed: int = 0, **options):
    """A tiny network whose weights are all random, also those that begin at zero."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = network_class(**options).eval()
        for parameter in network.parameters():
            if not parameter.any():
                torch.nn.init.normal_(parameter, std=0.3)
    return network


def stock(rows: int | None = 4, seed: int = 0, **options) -> UNet2DModel:
    return make_network(UNet2DModel, seed, **{**STOCK, "num_class_embeds": rows, **options})


def edm2(classes: int | None = 3, seed: int = 0, **options) -> EDM2UNet2DModel:
    return make_network(EDM2UNet2DModel, seed, num_class_embeds=classes, **{**EDM2, **options})


def pipeline_of(unet, scheduler=None, names=NAMES, **components) -> ClassConditionalPipeline:
    if scheduler is None:
        scheduler = EDMHeunScheduler() if isinstance(unet, EDM2UNet2DModel) else EtaDDIMScheduler(**DDPM)
    pipeline = ClassConditionalPipeline(unet, scheduler, names, **components)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def generate(pipeline, labels=(0, 2), steps=3, **options) -> torch.Tensor:
    options = {
        "num_inference_steps": steps,
        "output_type": "latent",
        "generator": seeded(*range(len(labels))),
    } | options
    return pipeline(list(labels), **options).images


def loop(pipeline, predict, labels=(0, 2), steps=3) -> torch.Tensor:
    """The usual loop of diffusers, written out."""
    scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config)
    scheduler.set_timesteps(steps)
    noise = [torch.randn(3, 16, 16, generator=generator) for generator in seeded(*range(len(labels)))]
    sample = torch.stack(noise) * scheduler.init_noise_sigma
    with torch.no_grad():
        for timestep in scheduler.timesteps:
            model_output = predict(scheduler.scale_model_input(sample, timestep), timestep, torch.tensor(labels))
            sample = scheduler.step(model_output, timestep, sample).prev_sample
    return sample


def assert_near(images: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(images, expected, atol=1e-3 * expected.abs().max().item(), rtol=0)


class TestClasses:
    def test_the_last_embedding_of_a_stock_network(self):
        """It is the null class where it has no name."""
        pipeline = pipeline_of(stock(4))
        assert (pipeline.num_classes, pipeline.null_class) == (3, 3)
        unet = pipeline.unet

        def guided(sample, timestep, labels):
            null = unet(sample, timestep, torch.full_like(labels, 3)).sample
            return null + 2 * (unet(sample, timestep, labels).sample - null)

        assert_near(generate(pipeline, guidance_scale=2.0), loop(pipeline, guided))
        assert torch.equal(generate(pipeline), generate(pipeline, guidance_scale=5.0))
        assert torch.equal(generate(pipeline, [None]), generate(pipeline, [3]))

    @pytest.mark.parametrize(
        "unet",
        [stock(3), edm2(), make_network(ADMUNet2DModel, num_class_embeds=3, attention_head_dim=8, **STOCK)],
        ids=lambda unet: type(unet).__name__,
    )
    def test_no_null_class(self, unet):
        pipeline = pipeline_of(unet)
        assert (pipeline.num_classes, pipeline.null_class) == (3, None)
        assert torch.equal(generate(pipeline), generate(pipeline, guidance_scale=1.0))
        with pytest.raises(ValueError, match=r"guidance_scale is 2\.0.*no null class.*Autoguidance.*without classes"):
            generate(pipeline, guidance_scale=2.0)
        for label, message in ((None, "which this network does not have"), (3, "from 0 to 2$"), (-1, "out of range")):
            with pytest.raises(ValueError, match=message):
                generate(pipeline, [label])
        if type(unet) is not UNet2DModel:
            pipeline = pipeline_of(type(unet).from_config(unet.config, null_class=True).eval(), pipeline.scheduler)
            assert pipeline.null_class == 3
            assert generate(pipeline, [None, 0], guidance_scale=2.0).isfinite().all()

    def test_without_classes(self):
        pipeline = pipeline_of(stock(None), names=None)
        assert (pipeline.num_classes, pipeline.null_class) == (None, None)
        unet = pipeline.unet
        images = generate(pipeline, [None, None], guidance_scale=3.0)
        assert_near(images, loop(pipeline, lambda sample, timestep, _: unet(sample, timestep).sample))


class TestNoiseLevels:
    @pytest.mark.parametrize("unet", [edm2(), stock(4)], ids=["edm2", "stock"])
    @pytest.mark.parametrize("name", ["EDMEulerScheduler", "EDMDPMSolverMultistepScheduler", "EDMHeunScheduler"])
    def test_edm(self, name, unet):
        """The network sees the scaled sample and log(sigma) / 4, and gives the raw F."""
        pipeline = pipeline_of(unet, EDMHeunScheduler())
        swap_scheduler(pipeline, name)
        expected = loop(pipeline, lambda sample, timestep, labels: unet(sample, timestep, labels).sample)
        assert_near(generate(pipeline, guidance_scale=1.0), expected)
        assert expected.abs().max() < 20  # the noise was 80

    def test_a_swap_keeps_the_kind(self):
        edm, ddpm = pipeline_of(edm2()), make_pipeline()
        swap_scheduler(edm, S_churn=4.0, rho=5.0)
        assert type(edm.scheduler) is EDMHeunScheduler
        assert (edm.scheduler.config.S_churn, edm.scheduler.config.rho) == (4.0, 5.0)
        with pytest.raises(ValueError, match="alphas_cumprod, but the network was trained with EDM's noise levels"):
            swap_scheduler(edm, "DDIM")
        ddpm.scheduler = EDMEulerScheduler()
        with pytest.raises(ValueError, match=r"EDMEulerScheduler cannot.*trained with alphas_cumprod; take UniPC"):
            generate(ddpm)
        edm.scheduler = diffusers.CosineDPMSolverMultistepScheduler()
        with pytest.raises(ValueError, match=r"CosineDPMSolverMultistepScheduler cannot.*arc tangent"):
            generate(edm)
        stock_names = ["EDMDPMSolverMultistepScheduler", "EDMEulerScheduler"]
        assert scheduler_names(edm.noise_kind) == ["EDMHeunScheduler", *stock_names]

    @pytest.mark.parametrize("scheduler", [DDIMScheduler(**DDPM), LearnedVarianceDDPMScheduler(**DDPM)])
    def test_with_and_without_a_variance(self, scheduler):
        """Networks of C and of 2C channels under schedulers that use the variance, and others."""
        for channels in (3, 6):
            assert generate(pipeline_of(stock(out_channels=channels), scheduler)).isfinite().all()


class TestAutoguidance:
    @pytest.mark.parametrize("classes", [3, None])
    def test_formula(self, classes):
        """ref + g (net - ref), where a reference without classes gets no labels."""
        pipeline = pipeline_of(edm2(), guidance_unet=edm2(classes, seed=1, model_channels=16))
        unet, weaker = pipeline.unet, pipeline.guidance_unet

        def guided(sample, timestep, labels):
            reference = weaker(sample, timestep, None if classes is None else labels).sample
            return reference + 1.7 * (unet(sample, timestep, labels).sample - reference)

        assert_near(generate(pipeline, guidance_scale=1.7), loop(pipeline, guided))
        assert torch.equal(generate(pipeline), generate(pipeline_of(unet)))

    def test_before_the_null_class(self):
        unet = make_pipeline().unet
        guided = pipeline_of(unet, guidance_unet=unet)
        # its own reference leads nowhere
        assert_near(generate(guided, guidance_scale=3.0), generate(guided, guidance_scale=1.0))

    def test_interval_of_noise_levels(self):
        pipeline = pipeline_of(edm2(), guidance_unet=edm2(seed=1))
        pipeline.scheduler.set_timesteps(6)
        levels, seen = pipeline.scheduler.sigmas.tolist()[:-1], []
        pipeline.guidance_unet.register_forward_pre_hook(lambda _, arguments: seen.append(4 * arguments[1].item()))
        generate(pipeline, steps=6, guidance_scale=2.0, guidance_sigma_interval=(levels[9], levels[3]))
        torch.testing.assert_close(
            torch.tensor(seen).exp(), torch.tensor([s for s in levels if levels[9] < s <= levels[3]])
        )
        assert len(seen) == 6

    def test_interval_on_timesteps(self):
        """sigma = sqrt((1 - abar) / abar)."""
        pipeline, sizes = make_pipeline(), []
        pipeline.unet.register_forward_pre_hook(lambda _, arguments: sizes.append(len(arguments[0])))
        timesteps, abar = [900, 600, 300, 0], pipeline.scheduler.alphas_cumprod
        low, high = (((1 - abar[t]) / abar[t]).sqrt().item() for t in (0, 600))
        options = {"guidance_scale": 2.0, "guidance_sigma_interval": (low, high * 1.001), "timesteps": timesteps}
        pipeline([0], output_type="latent", **options)
        assert sizes == [1, 2, 2, 1]


class TestClassifier:
    def gradient(self, pipeline, sample, timestep, labels):
        with torch.enable_grad():
            sample = sample.detach().requires_grad_()
            log_p = pipeline.classifier(sample, timestep).logits.log_softmax(dim=1)
            return torch.autograd.grad(log_p[torch.arange(len(labels)), labels].sum(), sample)[0]

    @pytest.fixture
    def pipeline(self):
        return pipeline_of(stock(3, out_channels=6), classifier=make_network(ADMClassifierModel, **CLASSIFIER))

    @pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
    @pytest.mark.parametrize("name", ["DDIM", "EulerDiscrete"])
    def test_shifted_prediction(self, pipeline, name, prediction_type):
        """Algorithm 2: the noise prediction minus sqrt(1 - abar) gradient, whatever is predicted."""
        pipeline.scheduler = EtaDDIMScheduler(**DDPM | {"prediction_type": prediction_type})
        pipeline.scheduler = getattr(diffusers, f"{name}Scheduler").from_config(pipeline.scheduler.config)
        abar = pipeline.scheduler.alphas_cumprod.double()

        def predict(sample, timestep, labels):
            output = pipeline.unet(sample, timestep, labels).sample[:, :3]
            signal, noise = abar[timestep.long()].sqrt(), (1 - abar[timestep.long()]).sqrt()
            x = sample.double()
            epsilon = {
                "epsilon": output,
                "sample": (x - signal * output) / noise,
                "v_prediction": signal * output + noise * x,
            }[prediction_type]
            epsilon = epsilon - 200 * noise * self.gradient(pipeline, sample, timestep, labels)
            original = (x - noise * epsilon) / signal
            velocity = signal * epsilon - noise * original
            return {"epsilon": epsilon, "sample": original, "v_prediction": velocity}[prediction_type].float()

        images = generate(pipeline, classifier_scale=200.0)
        assert_near(images, loop(pipeline, predict))
        assert (images - generate(pipeline)).abs().max() > 0.05 * images.abs().max()

    def test_refusals(self, pipeline):
        with pytest.raises(ValueError, match="classifier_scale is -1, but must be at least 0"):
            generate(pipeline, classifier_scale=-1)
        with pytest.raises(ValueError, match=r"classifier_scale is 1, but must be 0: the pipeline has no classifier"):
            generate(make_pipeline(), classifier_scale=1)
        edm = pipeline_of(edm2(), classifier=pipeline.classifier)
        with pytest.raises(ValueError, match="noise levels that the classifier was not trained with"):
            generate(edm, classifier_scale=1)


class TestSaving:
    def test_all_components(self, tmp_path):
        """A folder that loads with the package, and by its own files."""
        pipeline = pipeline_of(edm2(), guidance_unet=edm2(seed=1))
        expected = generate(pipeline, guidance_scale=1.7)
        pipeline.save_pretrained(tmp_path)
        assert (tmp_path / "guidance_unet" / "unet_edm2.py").is_file()
        for loaded in (ClassConditionalPipeline, DiffusionPipeline):
            again = loaded.from_pretrained(tmp_path, trust_remote_code=True)
            assert torch.equal(generate(again, guidance_scale=1.7), expected)
            assert again.classifier is None

    def test_stock_components(self, tmp_path):
        classifier = make_network(ADMClassifierModel, **CLASSIFIER)
        pipeline = pipeline_of(stock(3), DDIMScheduler(**DDPM), classifier=classifier)
        pipeline.save_pretrained(tmp_path)
        assert not list((tmp_path / "unet").glob("*.py"))
        images = generate(ClassConditionalPipeline.from_pretrained(tmp_path), classifier_scale=2.0)
        assert torch.equal(images, generate(pipeline, classifier_scale=2.0))
        given = ClassConditionalPipeline.from_pretrained(tmp_path, guidance_unet=make_unet())
        assert given.guidance_unet is not None
