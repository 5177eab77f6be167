"""What every network promises, whatever it computes."""

import torch
from safetensors.torch import load_file


class NetworkContract:
    """Mixin: a test class gives ``make()``, a tiny network, and ``answer(network)``, what it says to fixed inputs."""

    def test_checkpointing_changes_no_gradient(self):
        gradients = []
        for checkpointing in (False, True):
            network = self.make().train()
            if checkpointing:
                network.enable_gradient_checkpointing()
                assert network.is_gradient_checkpointing
            self.answer(network).square().sum().backward()
            gradients.append({name: weight.grad for name, weight in network.named_parameters()})
        assert [name for name, gradient in gradients[0].items() if gradient is None] == []
        torch.testing.assert_close(*gradients)

    def test_saving_and_loading(self, tmp_path):
        network = self.make()
        network.save_pretrained(tmp_path)
        stored = load_file(tmp_path / "diffusion_pytorch_model.safetensors")
        assert stored.keys() == dict(network.named_parameters()).keys()
        for low_cpu_mem_usage in (True, False):
            loaded = type(network).from_pretrained(tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
            assert torch.equal(self.answer(loaded), self.answer(network))
