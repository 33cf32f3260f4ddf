"""easy-vqa as conversations (PyPI package `easy-vqa`, MIT: 5,000 small images, 48,248 questions, 13 answers)."""

import hashlib
import importlib.metadata
import importlib.util
import json
import random
from pathlib import Path

from mmpeft_fast.atomic import write_text
from mmpeft_fast.data import prompts

SPLITS = ("train", "test")


def easy_vqa_conversations(
    folder: str | Path, split: str, *, limit: int | None = None, seed: int = 42
) -> tuple[Path, Path]:
    """Write easy-vqa as LLaVA's conversation JSON into `folder`, once.

    split: "train" or "test". limit: a random subset of that size, drawn with `seed`; None takes all, in a random order.
    Returns the JSON's path and the folder of the images, which stay in the installed package. A manifest beside the
    JSON says what it holds; a JSON that is missing, cut short or changed is written again. Raises ValueError where the
    package is missing or an argument is wrong.
    """
    if split not in SPLITS:
        raise ValueError(f"easy-vqa: expected split 'train' or 'test', got {split!r}")
    package = package_folder()
    questions = json.loads((package / "data" / split / "questions.json").read_text(encoding="utf-8"))
    size = len(questions) if limit is None else limit
    if not 1 <= size <= len(questions):
        raise ValueError(f"easy-vqa: expected a limit of 1 to {len(questions)} for split {split!r}, got {limit}")

    images = package / "data" / split / "images"
    path = Path(folder) / f"easy_vqa-{split}-{size}-seed{seed}.json"
    manifest_path = path.with_suffix(".manifest.json")
    request = {
        "package": f"easy-vqa {importlib.metadata.version('easy-vqa')}",
        "split": split,
        "size": size,
        "seed": seed,
        "prompt": prompts.vqa("{Q}"),
    }
    if not _is_done(path, manifest_path, request):
        drawn = random.Random(seed).sample(range(len(questions)), size)
        text = json.dumps([_conversation(split, index, *questions[index]) for index in drawn])
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, text)
        # The manifest comes last: it vouches for a file that is complete.
        write_text(manifest_path, json.dumps({**request, "sha256": _sha256(text)}, indent=2))
    return path, images


def _conversation(split: str, index: int, question: str, answer: str, image_id: int) -> dict:
    return {
        "id": f"{split}-{index}",
        "image": f"{image_id}.png",
        "conversations": [
            {"from": "human", "value": prompts.with_image(prompts.vqa(question))},
            {"from": "gpt", "value": answer},
        ],
    }


def _is_done(path: Path, manifest_path: Path, request: dict) -> bool:
    try:
        manifest = json.loads(manifest_path.read_text(encoding="utf-8"))
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return False
    return manifest == {**request, "sha256": _sha256(text)}


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def package_folder() -> Path:
    """Where the package keeps its data, found without importing it."""
    spec = importlib.util.find_spec("easy_vqa")
    if spec is None or spec.origin is None:
        raise ValueError("easy-vqa: expected the package to be installed, found none; run: pip install easy-vqa")
    return Path(spec.origin).parent
