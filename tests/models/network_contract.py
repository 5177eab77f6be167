"""What every network promises, whatever it computes."""

import pytest
import torch
from safetensors.torch import load_file


class NetworkContract:
    """Mixin: a test class gives ``make()``, a tiny network, and ``inputs()``, a sample, timesteps, labels if any."""

    def answer(self, network, timestep=None):
        sample, timesteps, *labels = self.inputs()
        return network(sample, timesteps if timestep is None else timestep, *labels, return_dict=False)[0]

    def test_timestep_as_anything(self):
        network = self.make()
        expected = self.answer(network, torch.full((len(self.inputs()[0]),), 0.7))
        for timestep in (0.7, torch.tensor(0.7), torch.tensor([0.7], dtype=torch.float64)):
            torch.testing.assert_close(self.answer(network, timestep), expected)

    def test_checkpointing_changes_no_gradient(self):
        gradients = []
        for checkpointing in (False, True):
            network = self.make().train()
            if checkpointing:
                network.enable_gradient_checkpointing()
                assert network.is_gradient_checkpointing
            self.answer(network).square().sum().backward()
            gradients.append({name: weight.grad for name, weight in network.named_parameters()})
        # that of a key's bias is zero but for rounding
        unused = [name for name, gradient in gradients[0].items() if gradient is None or not gradient.any()]
        assert [name for name in unused if not name.endswith("to_k.bias")] == []
        torch.testing.assert_close(*gradients)

    def test_saving_and_loading(self, tmp_path):
        network = self.make()
        network.save_pretrained(tmp_path)
        assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", ".safetensors"]
        stored = load_file(tmp_path / "diffusion_pytorch_model.safetensors")
        # random frequencies are, tables of encodings are not
        assert {name for name in stored if "fourier" not in name} == dict(network.named_parameters()).keys()
        # diffusers loads what it keeps in float32 in one way only
        for low_cpu_mem_usage in (True, False) if network._keep_in_fp32_modules is None else (True,):
            loaded = type(network).from_pretrained(tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
            assert not loaded.training
            assert torch.equal(self.answer(loaded), self.answer(network))


class CheckedInputContract(NetworkContract):
    """Mixin for networks that say what is wrong with their input; ``make`` takes options."""

    def test_wrong_input(self):
        unet, sample, label = self.make(), self.inputs()[0], torch.tensor([0])
        channels = sample.shape[1]
        for message, network, *arguments in (
            (
                rf"shape \(3, {2 * channels}, 16, 16\), but must be \(batch, {channels}, h",
                unet,
                sample.repeat(1, 2, 1, 1),
                0,
            ),
            ("sample is 16x15, which . (levels cannot halve|halvings do not divide)", unet, sample[..., :15], 0),
            ("timestep has 2 entries, but must have 1 or 3", unet, sample, torch.zeros(2)),
            (r"class_labels has shape \(1,\), but must be \(3,\)", unet, sample, 0, label),
            ("class_labels were given, but num_class_embeds", self.make(num_class_embeds=None), sample[:1], 0, label),
        ):
            with pytest.raises(ValueError, match=message):
                network(*arguments)
