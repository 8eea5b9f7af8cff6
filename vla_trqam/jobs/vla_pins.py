"""Which files a run of a LeRobot policy is trained on, and their commits on the Hub."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from vla_trqam.adapters.loading import adapter_base, fetch
from vla_trqam.config.vla_settings import FinetuneVLAConfig, OneDatasetConfig
from vla_trqam.data.frames import image_key
from vla_trqam.data.sources.lerobot.hub import commit_of
from vla_trqam.data.sources.lerobot.several import LeRobotDatasets, source_names
from vla_trqam.data.sources.lerobot.source import LeRobotConfig, LeRobotReader
from vla_trqam.engine.folder.pins import Input, began_at, read_pins, write_pins
from vla_trqam.preflight.memory import in_words

# Weights, configs, processors with their statistics, tokenizers; not the card.
OF_A_POLICY = (".json", ".safetensors", ".model", ".txt", ".jinja")
INFO = "meta/info.json"
TOLD = 2**30
"""Bytes whose reading a user would wonder about."""


def take_pins(config: FinetuneVLAConfig) -> str | None:
    """A resumed run takes what it began with, wherever a branch or a link has moved since.

    Returns:
        The commit of an adapter's base, which no setting names.
    """
    if not config.resume:
        return None
    assert config.output_dir is not None
    pins, policy = read_pins(config.output_dir), config.policy
    if "policy" in pins and policy.path is not None:
        policy.revision = pins["policy"].commit or policy.revision
        policy.path = str(began_at(pins["policy"], Path(policy.path)))
    if "tokenizer" in pins and policy.tokenizer is not None:
        policy.tokenizer = began_at(pins["tokenizer"], policy.tokenizer)
    datasets: list[OneDatasetConfig] = [config.dataset, *config.dataset.more]
    for name, data in zip(source_names(len(datasets)), datasets, strict=True):
        if name in pins:
            data.revision = pins[name].commit or data.revision
        if name in pins and data.root is not None:
            data.root = began_at(pins[name], data.root)
        labels = pins.get(_labels_of(name))
        if labels is not None and data.success_labels is not None:
            data.success_labels = began_at(labels, data.success_labels, data.success_labels.name)
    return pins["base"].commit if "base" in pins else None


def _labels_of(dataset: str) -> str:
    return dataset.replace("dataset", "success labels")


def pin_inputs(config: FinetuneVLAConfig, packed: Path | None, datasets: LeRobotDatasets) -> None:
    """Notes every file that a new run learns from, with its digest."""
    assert config.output_dir is not None
    sources = sources_of(config, packed, datasets)
    size = sum(
        (source.folder / name).stat().st_size
        for source in sources
        if source.folder is not None
        for name in source.files
    )
    if size >= TOLD:
        print(f"reading {in_words(size)} of policy and data, by which a resume knows them again")
    write_pins(config.output_dir, sources)


def sources_of(
    config: FinetuneVLAConfig, packed: Path | None, datasets: LeRobotDatasets
) -> list[Input]:
    """Policy, an adapter's base, tokenizer, datasets and their labels of a new run."""
    found = _policies(config, packed)
    tokenizer = config.policy.tokenizer
    if tokenizer is not None:
        folder = Path(tokenizer).expanduser()
        found.append(Input("tokenizer", str(tokenizer), folder, _files(folder)))
    return [*found, *_datasets(config, packed, datasets)]


def _policies(config: FinetuneVLAConfig, packed: Path | None) -> list[Input]:
    path = config.policy.path or str(packed and packed / "policy")
    checkpoint = fetch(path, config.policy.revision)
    found = [_policy("policy", path, checkpoint.folder)]
    base = adapter_base(checkpoint)
    if base is not None:
        found.append(_policy("base", base.source, base.folder))
    return found


def _policy(name: str, asked: str, folder: Path) -> Input:
    return Input(name, asked, folder, _files(folder), commit_of(folder))


def _files(folder: Path) -> tuple[str, ...]:
    paths = sorted(path for path in folder.iterdir() if path.suffix in OF_A_POLICY)
    return tuple(path.name for path in paths if path.is_file())


def _datasets(
    config: FinetuneVLAConfig, packed: Path | None, datasets: LeRobotDatasets
) -> Iterator[Input]:
    """Each dataset without the videos of cameras that nobody looks through, and its labels."""
    for name, reader in datasets.named.items():
        data = reader.config
        is_packed = name == "dataset" and config.dataset.repo_id is None
        asked = "packed" if is_packed else data.repo_id
        yield _dataset(name, asked, _local_dataset(data), reader)
        labels = data.success_labels
        if labels is not None:
            yield Input(_labels_of(name), str(labels), labels.parent, (labels.name,))


def _dataset(name: str, asked: str, root: Path | None, reader: LeRobotReader) -> Input:
    commit = reader.revision
    if root is None or commit is not None:
        return Input(name, asked, None, commit=commit)
    original = {new: old for old, new in reader.config.rename_map.items()}
    names = [image_key(name) for name in reader.cameras]
    videos = [root / "videos" / original.get(name, name) for name in names]
    paths = [path for part in (root / "meta", root / "data", *videos) for path in part.rglob("*")]
    beside = [] if reader.config.reward_file is None else [root / reader.config.reward_file]
    files = sorted(str(path.relative_to(root)) for path in [*paths, *beside] if path.is_file())
    return Input(name, asked, root, tuple(files))


def _local_dataset(data: LeRobotConfig) -> Path | None:
    """The dataset's folder of this machine, as LeRobot looks for it; None for the Hub's."""
    if data.root is not None:
        return data.root
    from lerobot.utils.constants import HF_LEROBOT_HOME

    own = Path(HF_LEROBOT_HOME) / data.repo_id
    return own if (own / INFO).is_file() else None
