"""Which datasets fit a policy, and what the critic sees of an observation."""

from typing import Any

import pytest
import torch
from lerobot_contract import ACTION, CAMERAS, FAMILIES, STATE, checkpoint, make_policy, observation
from vla_trqam.adapters.critic_features import CriticFeatures
from vla_trqam.adapters.dataset_check import check_against_dataset, dataset_problems
from vla_trqam.adapters.loading import load_policy
from vla_trqam.adapters.lora import LoRASettings

from vla_trqam.errors import UserError

pytestmark = pytest.mark.slow

LORA = LoRASettings(r=4)


# The dataset.


def dataset_features() -> dict[str, dict[str, Any]]:
    image = {"dtype": "video", "shape": (32, 32, 3)}
    features: dict[str, dict[str, Any]] = {f"observation.images.{c}": image for c in CAMERAS}
    features["observation.state"] = {"dtype": "float32", "shape": (STATE,)}
    features["action"] = {"dtype": "float32", "shape": (ACTION,)}
    return features


def dataset_stats(scale: float = 1.0) -> dict[str, dict[str, list[float]]]:
    return {"observation.state": {"mean": [scale] * STATE}, "action": {"mean": [0.1] * ACTION}}


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_dataset_that_fits_raises_nothing(kind: str) -> None:
    check_against_dataset(make_policy(kind, lora=True), dataset_features(), dataset_stats())


def test_cameras_may_be_renamed() -> None:
    policy, features = make_policy("tiny_pi0", lora=True), dataset_features()
    features["observation.images.front"] = features.pop("observation.images.top")
    assert not list(dataset_problems(policy, features)), "the host does without one"
    (problem,) = dataset_problems(make_policy("multi_task_dit", lora=True), features)
    assert "the policy looks through observation.images.top, the dataset's cameras" in problem
    del features["observation.images.wrist"]
    problems = list(dataset_problems(policy, features))
    assert [p.split()[4] for p in problems] == [f"observation.images.{c}," for c in CAMERAS]
    assert all("the dataset's cameras are observation.images.front (a" in p for p in problems)
    rename = {"observation.images.front": "observation.images.top"}
    check_against_dataset(policy, features, rename=rename)


def test_shapes_and_missing_columns_are_named() -> None:
    policy, features = make_policy("tiny_pi0", lora=True), dataset_features()
    features["observation.state"]["shape"] = (7,)
    features["observation.images.top"] = {"dtype": "float32", "shape": (3,)}
    del features["action"]
    problems = "\n".join(dataset_problems(policy, features))
    assert "observation.state has shape (7,) in the dataset" in problems
    assert "observation.images.top is float32 in the dataset" in problems
    assert "no 'action'" in problems


def test_numbers_in_other_units_are_noticed() -> None:
    policy = make_policy("tiny_pi0", lora=True)
    (problem,) = dataset_problems(policy, dataset_features(), dataset_stats(57.3))
    assert "observation.state[0] is 57.3" in problem


# What the critic sees.


@pytest.mark.parametrize("kind", FAMILIES)
def test_features_are_the_state_and_the_mean_over_valid_tokens(kind: str) -> None:
    policy = make_policy(kind, lora=True)
    seen = observation(kind, 2)
    both = policy.features(policy.encode(seen))
    assert torch.equal(both[:, -STATE:], seen["observation.state"])
    policy.critic_features = CriticFeatures(state=False)
    prefix = policy.features(policy.encode(seen))
    assert torch.equal(both[:, :-STATE], prefix)
    assert prefix.shape[1] == policy.feature_dim
    policy.critic_features = CriticFeatures(layer=None)
    assert torch.equal(policy.features(policy.encode(seen)), seen["observation.state"])
    assert policy.feature_dim == STATE


def test_features_of_a_short_instruction_do_not_depend_on_its_padding() -> None:
    policy = make_policy("tiny_pi0", lora=True)
    seen = observation("tiny_pi0", 2)
    tokens = seen["observation.language.tokens"].clone()
    tokens[~seen["observation.language.attention_mask"]] = 7
    other = seen | {"observation.language.tokens": tokens}
    same, expected = policy.encode(other), policy.encode(seen)
    torch.testing.assert_close(policy.features(same), policy.features(expected))


@pytest.mark.parametrize("kind", ["tiny_pi0", "tiny_pi05", "smolvla"])
def test_layers_are_counted_as_in_transformers(kind: str) -> None:
    folder, seen = checkpoint(kind), observation(kind, 2)
    features = {}
    for layer in (0, 1, 2, -1, -2):
        policy = load_policy(folder, features=CriticFeatures(layer, state=False), lora=LORA)
        features[layer] = policy.features(policy.encode(seen))
    assert torch.equal(features[2], features[-1])
    assert torch.equal(features[1], features[-2])
    assert not torch.allclose(features[0], features[1])
    assert not torch.allclose(features[1], features[2])
    for layer in (3, -4):
        with pytest.raises(UserError, match=f"critic_layer is {layer}"):
            load_policy(folder, features=CriticFeatures(layer))


def test_layer_0_is_the_embeddings() -> None:
    policy = load_policy(checkpoint("tiny_pi0"), features=CriticFeatures(0, state=False), lora=LORA)
    seen = observation("tiny_pi0", 2)
    images, masks = policy.host._preprocess_images(seen)
    embedded, valid, _ = policy.host.model.embed_prefix(
        images,
        masks,
        seen["observation.language.tokens"],
        seen["observation.language.attention_mask"],
    )
    expected = torch.stack([e[v].mean(0) for e, v in zip(embedded, valid, strict=True)])
    torch.testing.assert_close(policy.features(policy.encode(seen)), expected.detach())


@pytest.mark.parametrize("kind", ["tiny_pi0", "tiny_pi05", "smolvla"])
def test_parts_are_each_cameras_tokens_and_the_rest(kind: str) -> None:
    """Another picture changes its own part of the embeddings, another text the rest's."""
    by_parts = CriticFeatures(0, state=False, pooling="parts")
    policy = load_policy(checkpoint(kind), features=by_parts, lora=LORA)
    seen = observation(kind, 2)
    cameras = list(policy.host.config.image_features)
    width = policy.feature_dim // (len(cameras) + 1)

    def parts_that_change(key: str) -> list[int]:
        other = seen | {key: seen[key].flip(0)}
        found = [policy.features(policy.encode(each)) for each in (seen, other)]
        assert found[0].shape == (2, policy.feature_dim)
        changed = (found[0] != found[1]).view(2, -1, width).any(dim=2).any(dim=0)
        return changed.nonzero().flatten().tolist()

    for number, camera in enumerate(cameras):
        assert parts_that_change(camera) == [number]
    tokens = "observation.language.tokens"
    seen[tokens] = seen[tokens].clone()
    seen[tokens][0, 0] = 7  # the two are told other things
    assert parts_that_change(tokens) == [len(cameras)]


@pytest.mark.parametrize("kind", ["tiny_pi0", "tiny_pi05", "smolvla"])
def test_averages_over_parts_make_the_one_over_all(kind: str) -> None:
    policy, seen = make_policy(kind, lora=True), observation(kind, 2)
    policy.critic_features = CriticFeatures(state=False)
    whole = policy.features(policy.encode(seen))
    policy.critic_features = CriticFeatures(state=False, pooling="parts")
    own = policy.features(policy.encode(seen)).view(2, -1, whole.shape[1])
    found = policy.family.encode(policy.host, seen, len(policy.family.prefix_layers(policy.host)))
    counts = torch.stack([v.sum(dim=1) for v in found.valid.split(list(found.parts), 1)], dim=1)
    joined = (own * counts.unsqueeze(2)).sum(dim=1) / counts.sum(dim=1, keepdim=True)
    torch.testing.assert_close(joined, whole)


def test_parts_want_every_camera() -> None:
    policy, seen = make_policy("smolvla", lora=True), observation("smolvla", 2)
    policy.critic_features = CriticFeatures(pooling="parts")
    features = policy.host.config.input_features
    features["observation.images.other"] = features[next(iter(policy.host.config.image_features))]
    with pytest.raises(UserError, match="it has 3, and the prefix of this observation 2"):
        policy.encode(seen)


def test_no_features_at_all_are_refused() -> None:
    with pytest.raises(UserError, match="no features"):
        CriticFeatures(layer=None, state=False)
