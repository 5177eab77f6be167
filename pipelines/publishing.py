"""Uploading a pipeline to the Hub: everything that loading it needs, with its model card, in one commit."""

import tempfile
from collections.abc import Collection
from pathlib import Path
from typing import cast

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

    A ``README.md`` that somebody has written, or changed, in the repository stays as it is. One that was made here and
    is untouched gives way to the folder's. Where there is none, that of the folder is uploaded, else one is made.

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
    api = HfApi(token=token)
    folder = Path(folder)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id

    additions: dict[str, str | bytes] = {}
    for file in sorted(folder.rglob("*")):
        inside = file.relative_to(folder)
        hidden = any(part.startswith(".") for part in inside.parts)
        if file.is_file() and not hidden and inside.parts[0] not in leave_out:
            additions[inside.as_posix()] = str(file)
    # everything but the card may be bytes
    card = cast(str | None, additions.pop(CARD_NAME, None))
    if subfolder is None:
        text = None if card is None else with_repo_id(Path(card).read_text(encoding="utf-8"), repo_id)
        if not api.file_exists(repo_id, CARD_NAME):
            text = text or str(create_model_card(pipeline, repo_id=repo_id))
        elif text is not None and not is_untouched(_present_card(api, repo_id)):
            logger.warning(
                f"{repo_id} keeps its {CARD_NAME}, which somebody has written or changed; {card} is not uploaded"
            )
            text = None
        if text is not None:
            additions[CARD_NAME] = text.encode()

    prefix = "" if subfolder is None else f"{subfolder.strip('/')}/"
    # not upload_folder, which may spread what takes long over several commits
    return api.create_commit(
        repo_id,
        [CommitOperationAdd(prefix + name, content) for name, content in additions.items()],
        commit_message=commit_message or f"Upload {type(pipeline).__name__}",
        create_pr=create_pr,
    )


def _present_card(api: HfApi, repo_id: str) -> str:
    """The card that a repository has."""
    with tempfile.TemporaryDirectory() as folder:
        return Path(api.hf_hub_download(repo_id, CARD_NAME, local_dir=folder)).read_bytes().decode("utf-8", "replace")
