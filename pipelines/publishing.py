"""Uploading a pipeline to the Hub: everything that loading it needs, with its model card, in one commit."""

import tempfile
from collections.abc import Collection
from pathlib import Path

from diffusers.utils import logging
from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi

from .model_card import CARD_NAME, create_model_card, is_untouched, with_repo_id
from .pipeline_class_conditional import ClassConditionalPipeline


logger = logging.get_logger(__name__)


def push_pipeline(
    pipeline: ClassConditionalPipeline,
    repo_id: str,
    commit_message: str | None = None,
    private: bool | None = None,
    token: str | None = None,
    create_pr: bool = False,
    safe_serialization: bool = True,
    variant: str | None = None,
    subfolder: str | None = None,
) -> CommitInfo:
    """Saves a pipeline and uploads it; arguments as for `ClassConditionalPipeline.push_to_hub`."""
    with tempfile.TemporaryDirectory() as name:
        pipeline.save_pretrained(name, safe_serialization=safe_serialization, variant=variant)
        return push_folder(
            pipeline,
            name,
            repo_id,
            commit_message=commit_message,
            private=private,
            token=token,
            create_pr=create_pr,
            subfolder=subfolder,
        )


def push_folder(
    pipeline: ClassConditionalPipeline,
    folder: str | Path,
    repo_id: str,
    *,
    commit_message: str | None = None,
    private: bool | None = None,
    token: str | None = None,
    create_pr: bool = False,
    subfolder: str | None = None,
    leave_out: Collection[str] = (),
) -> CommitInfo:
    """Uploads a folder that holds a saved pipeline. Hidden files stay where they are.

    A ``README.md`` that somebody has written, or changed, in the repository stays. One that was made here and is
    untouched gives way to the folder's. Where there is none, the folder's is uploaded, else one is made.

    Args:
        pipeline: What was saved to the folder; the card is made from it.
        folder: The folder.
        repo_id: Where to, ``"user/name"``; made where there is none.
        commit_message: By default ``"Upload ClassConditionalPipeline"``.
        private: Whether a new repository is private; by default that is for the account to say.
        token: By default the one that is logged in.
        create_pr: Opens a pull request instead of changing the main branch.
        subfolder: The folder in the repository; the card is for its root and left out then.
        leave_out: Names of files and folders at the top of the folder that are not uploaded.

    Raises:
        huggingface_hub.errors.HfHubHTTPError: An OSError. The repository is as it was then, because all files come in
            one commit, the last thing that is sent.
    """
    api, folder = HfApi(token=token), Path(folder)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    files = {path.relative_to(folder): path for path in sorted(folder.rglob("*")) if path.is_file()}
    additions: dict[str, str | bytes] = {  # name in the repository -> path or content
        name.as_posix(): str(path)
        for name, path in files.items()
        if name.parts[0] not in leave_out and not any(part.startswith(".") for part in name.parts)
    }
    additions.pop(CARD_NAME, None)
    if subfolder is None:
        file = files.get(Path(CARD_NAME))
        card = None if file is None else with_repo_id(file.read_text(encoding="utf-8"), repo_id)
        if not api.file_exists(repo_id, CARD_NAME):
            card = card or str(create_model_card(pipeline, repo_id=repo_id))
        elif card is not None:
            with tempfile.TemporaryDirectory() as place:
                present = Path(api.hf_hub_download(repo_id, CARD_NAME, local_dir=place)).read_bytes()
            if not is_untouched(present.decode("utf-8", "replace")):
                logger.warning(f"{repo_id} keeps its {CARD_NAME}, which somebody has written or changed; not {file}")
                card = None
        if card is not None:
            additions[CARD_NAME] = card.encode()

    prefix = "" if subfolder is None else f"{subfolder.strip('/')}/"
    # not upload_folder, which may spread what takes long over several commits
    return api.create_commit(
        repo_id,
        [CommitOperationAdd(prefix + name, content) for name, content in additions.items()],
        commit_message=commit_message or f"Upload {type(pipeline).__name__}",
        create_pr=create_pr,
    )
