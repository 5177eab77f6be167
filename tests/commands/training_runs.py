"""Training runs as processes, and what they leave behind."""

import json
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from imagenet64_diffusion.tests.commands.processes import CommandProcess, snapshot, wait_until
from imagenet64_diffusion.train_imagenet64 import main


TINY = {"stem_channels": 8, "block_out_channels": [8, 16], "time_embed_dim": 16, "class_embed_dim": 16}
TINY |= {"layer_types": ["resnet", "class_attention", "channel_attention"]}
_STOCK = {"block_out_channels": [8, 16], "layers_per_block": 1, "norm_num_groups": 4, "attention_head_dim": 8}
_STOCK |= {"down_block_types": ["DownBlock2D", "AttnDownBlock2D"], "up_block_types": ["AttnUpBlock2D", "UpBlock2D"]}
# One network of each class that can be trained.
NETWORKS: dict[str, dict[str, Any]] = {
    "ours": {"_class_name": "ClassConditionalUNet2DModel", **TINY},
    "stock": {"_class_name": "UNet2DModel", **_STOCK},
    "adm": {"_class_name": "ADMUNet2DModel", **_STOCK},
    "edm2": {
        "_class_name": "EDM2UNet2DModel",
        **{"model_channels": 16, "channel_mult": [1, 2], "layers_per_block": 1, "logvar_channels": 8},
        **{"attention_resolutions": [8], "attention_head_dim": 8},
    },
}
QUIET = {"num_inference_steps": 2, "num_samples_per_class": 1, "report_to": "none"}
# Everything that a checkpoint must keep has an effect: batches cross the borders of epochs, the history of losses
# fills, and entries of the log, checkpoints and samples come at different steps.
EVERYTHING = {
    "max_train_steps": 20,
    "train_batch_size": 5,
    "gradient_accumulation_steps": 2,
    "timestep_sampling": "importance",
    "num_train_timesteps": 4,
    "dropout": 0.1,
    "random_flip": True,
    "learning_rate": 1e-3,
    "lr_scheduler": "cosine",
    "lr_warmup_steps": 3,
    "logging_steps": 4,
    "checkpointing_steps": 6,
    "sample_steps": 6,
    "pipeline_steps": 12,
    **QUIET,
}


class TrainingRun:
    """A command that trains, which may live several times; an option of None is left out."""

    def __init__(self, folder: Path, prepared: Path, options: Mapping[str, Any], network: Mapping[str, Any] = TINY):
        folder.mkdir(exist_ok=True, parents=True)
        self.folder, self.prepared, self.options = folder, prepared, dict(options)
        self.output_dir, self.checkpoints = folder / "out", folder / "out" / "checkpoints"
        self._num_processes = 0
        if "pretrained_model_name_or_path" not in options:
            self.options.setdefault("model_config_name_or_path", folder / "unet.json")
            (folder / "unet.json").write_text(json.dumps(network))

    def arguments(self, **changes: Any) -> list[str]:
        """The command line, with changed options."""
        options = {"train_data_dir": self.prepared, "output_dir": self.output_dir, **self.options, **changes}
        found = []
        for name, value in options.items():
            if value is not None:
                found += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
        return found

    def start(
        self, environment: Any = None, largest_file: int | None = None, directory: Path | None = None, **changes: Any
    ) -> CommandProcess:
        """Begins a process of the run, with changed options."""
        self._num_processes += 1
        log = self.folder / f"process_{self._num_processes}.txt"
        return CommandProcess(self.arguments(**changes), log, environment, largest_file, directory)

    def finish(self, **changes: Any) -> str:
        """Lives to the end, which must be a good one; gives what it said."""
        process = self.start(**changes)
        assert process.end() == 0, process.output()
        return process.output()

    def kill_when(self, happens: Callable[[], Any], **changes: Any) -> str:
        """Lives until something happens, and is killed; gives what it said."""
        process = self.start(**changes)
        wait_until(happens, process)
        process.send(signal.SIGKILL)
        assert process.end() == -signal.SIGKILL
        return process.output()

    def refuse(self, capsys: Any, **changes: Any) -> str:
        """Is refused with a sentence, which it gives, and changes nothing."""
        before = snapshot(self.folder)
        assert main(self.arguments(**changes)) == 2
        assert snapshot(self.folder) == before
        errors = capsys.readouterr().err
        assert "Traceback" not in errors
        return errors.strip().splitlines()[-1]

    def metrics(self) -> list[dict[str, Any]]:
        """The entries of the log."""
        file = self.output_dir / "metrics.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def checkpoint_names(self) -> list[str]:
        """What is in the folder of checkpoints, hidden ones too."""
        return sorted(path.name for path in self.checkpoints.iterdir()) if self.checkpoints.exists() else []

    def contents(self) -> dict[str, Any]:
        """What the run has left, by file, without its speed, its memory and its place."""
        found = {}
        for file in sorted(path for path in self.output_dir.rglob("*") if path.is_file()):
            name = str(file.relative_to(self.output_dir))
            if name == "metrics.jsonl":
                found[name] = self.metrics()
                for entry in found[name]:
                    del entry["images_per_second"], entry["peak_memory_gib"]
            elif file.name == "training_state.json":
                state = json.loads(file.read_text())
                state.pop("sha256", None)
                for key in ("output_dir", "model_config_name_or_path", "dataloader_num_workers", "report_to"):
                    state["options"].pop(key)
                found[name] = state
            elif not name.startswith("train/"):
                found[name] = file.read_bytes()
        return found


def assert_equal_runs(run: TrainingRun, undisturbed: TrainingRun) -> None:
    """Everything that two runs have left is equal, bit for bit."""
    left, expected = run.contents(), undisturbed.contents()
    assert sorted(left) == sorted(expected), sorted({*left} ^ {*expected})
    for name in left:
        assert left[name] == expected[name], name
