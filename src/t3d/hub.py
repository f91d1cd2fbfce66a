"""Checkpoints and trajectories, uploaded to the Hugging Face hub (or what HF_ENDPOINT names)."""

import json
import tempfile
from pathlib import Path

import yaml

from t3d import __version__
from t3d.errors import T3DError
from t3d.log import log
from t3d.models.files import FILES, check_weights, first_line, local_folder
from t3d.trajectories import TrajectoryDataset

CARD = "README.md"


def push_checkpoint(folder: Path, repo_id: str, private: bool = False) -> str:
    """Upload a checkpoint folder with its model card; returns the address.

    Raises:
        T3DError: it is no whole checkpoint, or the hub cannot be reached or does not take it.
    """
    check_weights(local_folder(folder))
    return _push(folder, repo_id, "model", private, allow=[*FILES, CARD], replaces="*.safetensors*")


def push_trajectories(folder: Path, repo_id: str, private: bool = False) -> str:
    """Upload a folder of trajectories as a dataset, with a card that says what is in it; returns the address.

    Raises:
        T3DError: there are none, or the hub cannot be reached or does not take them.
    """
    dataset = TrajectoryDataset(folder)
    with tempfile.TemporaryDirectory() as made:  # the shards as they lie in the repository, and nothing in the user's
        (Path(made) / "data").mkdir()
        for path in dataset.paths:
            (Path(made) / "data" / path.name).symlink_to(path.resolve())
        (Path(made) / CARD).write_text(dataset_card(dataset, repo_id), encoding="utf-8")
        return _push(Path(made), repo_id, "dataset", private, allow=[CARD, "data/*"], replaces="data/*.parquet")


def dataset_card(dataset: TrajectoryDataset, repo_id: str) -> str:
    """The card of a dataset of trajectories, Markdown with the front matter that hubs read."""
    lengths, reasons = dataset.column("length"), dataset.column("finish_reason")
    verdicts = [verdict for verdict in dataset.column("correct") if verdict is not None]
    first, made_with = dataset[0], {k: v for k, v in dataset.metadata.items() if k != "versions"}
    front = {
        "tags": ["block-diffusion", "t3d", "trajectories"],
        "configs": [{"config_name": "default", "data_files": "data/*.parquet"}],
    }
    correct = f"{sum(verdicts) / len(verdicts):.1%} of {len(verdicts):,} verified" if verdicts else "not verified"
    facts = {
        "trajectories": f"{len(dataset):,}",
        "prompts": f"{len(set(dataset.column('prompt_id'))):,}",
        "correct": correct,
        "tokens on average": f"{sum(lengths) / len(lengths):.1f}",
        "cut at the token limit": f"{reasons.count('length'):,}",
        "block size": str(first.block_size),
    }
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---",
        f"# {repo_id.rpartition('/')[2]}",
        "Responses of a block-diffusion language model, each with the denoising step at which every token was "
        "committed (`step_map`) and its confidence then. Recorded with t3d for [T3D](https://arxiv.org/abs/2602.12262).",
        "| | |\n| --- | --- |\n" + "\n".join(f"| {name} | {value} |" for name, value in facts.items()),
        f'```python\nimport datasets\n\ndatasets.load_dataset("{repo_id}", split="train")\n```',
        "## Made with",
        f"```json\n{json.dumps(made_with, indent=1, ensure_ascii=False)}\n```",
    ]
    return "\n\n".join(parts) + "\n"


def _push(folder: Path, repo_id: str, kind: str, private: bool, allow: list[str], replaces: str) -> str:
    """replaces: files of the repository that go if the folder does not have them, such as shards of other weights."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    if repo_id.count("/") != 1:  # without an owner it may be somebody else's
        raise T3DError(f"{repo_id!r} is no repository: write OWNER/NAME")
    api = HfApi(token=True, library_name="t3d", library_version=__version__)
    try:
        if api.repo_exists(repo_id, repo_type=kind):
            if private and not api.repo_info(repo_id, repo_type=kind).private:
                raise T3DError(f"{repo_id} is there already, and public; make it private first, or choose another name")
            log.info("%s is there already and is updated", repo_id)
        url = api.create_repo(repo_id, repo_type=kind, private=private or None, exist_ok=True)
        api.upload_folder(
            repo_id=repo_id,
            repo_type=kind,
            folder_path=folder,
            allow_patterns=allow,
            delete_patterns=replaces,
            commit_message=f"Upload with t3d {__version__}",
        )
    except T3DError:
        raise
    except LocalTokenNotFoundError as error:
        raise T3DError("there is no token for the hub; set HF_TOKEN, or log in with `hf auth login`") from error
    except HfHubHTTPError as error:
        known = {401: "it does not know the token", 403: "the token may not write there"}
        reason = known.get(error.response.status_code, error.server_message or first_line(error))
        raise T3DError(f"the hub refuses to take {repo_id}: {reason}") from error
    except Exception as error:  # of many kinds: no network, an odd name, what the hub says of a card
        raise T3DError(f"cannot push to {repo_id}: {first_line(error)}") from error
    return str(url)
