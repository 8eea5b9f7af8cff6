"""The model card of a pushed checkpoint: ``README.md`` with the Hub's metadata in front."""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from vla_trqam.hub.card_facts import RunFacts
from vla_trqam.report.formats import percent, table
from vla_trqam.report.page import caption
from vla_trqam.report.provenance import package_versions
from vla_trqam.report.success import differences, effect_of_steps, success_table

PLOTS = "plots"
TINY = "tiny_"
BASE_TAGS = ("robotics", "reinforcement-learning", "off-policy-rl", "flow-matching", "vla_trqam")
OWN_NAMES = {"robomimic": "Robomimic", "ogbench": "OGBench"}
OF_ROBOMIMIC = ("env.cameras", "env.image_size", "env.shadows")
"""Settings that LeRobot's other environments do not have."""


def model_card(facts: RunFacts, repo_id: str, license_name: str | None) -> str:
    """The text of ``README.md``."""
    sections = [
        f"---\n{_metadata(facts, repo_id, license_name).to_yaml()}\n---",
        f"# {repo_id.partition('/')[2]}",
        _introduction(facts, license_name),
        _success(facts),
        _trust_region(facts),
        _use(facts, repo_id),
        _go_on(facts, repo_id),
        _how_it_was_made(facts),
        _figures(facts),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _metadata(facts: RunFacts, repo_id: str, license_name: str | None) -> ModelCardData:
    more: dict[str, Any] = {}
    if facts.base is not None:
        relation = "adapter" if facts.is_adapter else "finetune"
        more = {"base_model": facts.base, "base_model_relation": relation}
    there = [name for name in facts.datasets if name is not None]
    if there:
        more["datasets"] = there
    results = _results(facts)
    if results:
        more |= {"eval_results": results, "model_name": repo_id.partition("/")[2]}
    return ModelCardData(
        license=license_name,
        library_name="lerobot" if facts.for_lerobot else "vla_trqam",
        pipeline_tag="robotics",
        tags=[*BASE_TAGS, facts.method.lower(), facts.policy_type],
        **more,
    )


def _results(facts: RunFacts) -> list[EvalResult]:
    if facts.evaluation is None:
        return []
    return [
        EvalResult(
            task_type="robotics",
            task_name="Robot control",
            dataset_type=_simulator(facts)["name"],
            dataset_name=_where(facts),
            metric_type="success_rate",
            metric_name=f"Success rate on {len(facts.evaluation)} initial states",
            metric_value=round(100 * facts.evaluation.tuned_rate, 2),
        )
    ]


def _where(facts: RunFacts) -> str:
    simulator = _simulator(facts)
    name = OWN_NAMES.get(simulator["name"], simulator["name"])
    return f"{name} {simulator['task']}".strip()


def _simulator(facts: RunFacts) -> dict[str, str]:
    """What was played, and the task there."""
    if facts.simulator is not None:
        return facts.simulator
    # Of a run that said so in its settings alone, and of Robomimic's states nowhere.
    task = facts.setting("env.task") or (facts.title or "").rpartition(" on ")[2]
    return {"name": str(facts.setting("env.type") or "robomimic"), "task": str(task)}


def _introduction(facts: RunFacts, license_name: str | None) -> str:
    kind = "LoRA adapters of a" if facts.is_adapter else "A"
    base = f"[{facts.base}](https://huggingface.co/{facts.base})" if facts.base else "a policy"
    unless = "" if facts.base else " that is not on the Hub"
    made = "updates of the policy"
    lines = [
        f"{kind} `{facts.policy_type}` policy, tuned from its base ({base}{unless}) by"
        f" {facts.method}: off-policy reinforcement learning on the policy's weights, with the"
        " gradient of a critic, trained with `vla_trqam`.",
        "",
        f"- data: {_data(facts)}",
        f"- {f'{made} in this run, beside those before it' if facts.goes_on else made}:"
        f" {facts.position.step}",
        *_flow_steps(facts),
        f"- licence: {license_name or 'that of the base policy, which does not say which'}",
    ]
    return "\n".join(lines)


def _data(facts: RunFacts) -> str:
    there = [name for name in facts.datasets if name is not None]
    told = [f"[{name}](https://huggingface.co/datasets/{name})" for name in there]
    lacking = len(facts.datasets) - len(there)
    if lacking:
        told.append(
            "a dataset that is not on the Hub"
            if lacking == 1
            else f"{lacking} datasets that are not on the Hub"
        )
    return ", ".join(told)


def _flow_steps(facts: RunFacts) -> Iterable[str]:
    """What the policy acts with, and what its base came with where that is known."""
    if facts.num_flow_steps is not None:
        own = facts.flow_steps
        came = "" if own is None else f"; its base came with {own.own}"
        yield f"- flow steps from noise to action: {facts.num_flow_steps}{came}"


def _success(facts: RunFacts) -> str:
    evaluation = facts.evaluation
    if evaluation is None:
        return f"## Success\n\n**Not evaluated.** {facts.not_evaluated}."
    named = f"The interval of the {differences(evaluation)[0][0]}"
    claim = (
        f"{named} excludes zero."
        if evaluation.difference_interval().excludes_zero()
        else f"{named} includes zero: no difference is shown."
    )
    told = [claim, effect_of_steps(evaluation)]
    return "\n\n".join(
        [
            "## Success",
            f"{_where(facts)}, base and tuned policy on the same {len(evaluation)} initial states.",
            success_table(evaluation),
            f"{' '.join(filter(None, told))} Intervals: Wilson's for the rates, Newcombe's (1998,"
            " method 10) for the paired differences."
            f" McNemar's exact test: p = {evaluation.mcnemar_p():.2g}.",
        ]
    )


def _trust_region(facts: RunFacts) -> str:
    summary, unit = facts.trust_region, facts.kl_unit
    if summary is None:
        why = f"{facts.method} logged no KL budget up to this checkpoint."
        if facts.position.step == 0:
            why = "The policy had not moved yet: it is its base."
        return f"## Distance from the base\n\n{why}"
    assert facts.kl_final is not None
    share = f"{percent(summary.share_within)} within {summary.tolerance:.0%} of the budget"
    rows = [
        [f"KL budget ({unit})", f"{summary.kl_budget:.4g}"],
        [f"realised KL at the end ({unit})", f"{facts.kl_final:.4g}"],
        [f"realised KL over the last half ({unit})", f"{summary.kl_ema_mean:.4g}; {share}"],
        ["λ at the end", f"{summary.lam_final:.4g}"],
    ]
    note = (
        "The KL is that of paths of the flow's stochastic process, an upper bound on the actions'"
    )
    return (
        f"## Distance from the base\n\n{table(['', ''], rows)}\n\n{note}; it is the moving average"
        " that the multiplier λ follows."
    )


def _use(facts: RunFacts, repo_id: str) -> str:
    if not facts.for_lerobot:
        return (
            "## Use\n\n```python\nfrom pathlib import Path\n\n"
            "from vla_trqam.adapters.mlp import MLPFlowPolicy\n"
            "from vla_trqam.hub.pull import pull_checkpoint\n\n"
            f'folder = pull_checkpoint("{repo_id}", Path("pulled"))\n'
            'policy = MLPFlowPolicy.from_pretrained(folder / "pretrained_model")\n```'
        )
    plugins = list(_plugins(facts))
    needs = f" (with {' and '.join(plugins)} of `vla_trqam` installed)" if plugins else ""
    return (
        f"## Use\n\nStock LeRobot loads it{needs}:\n\n```bash\n{_lerobot_eval(facts, repo_id)}\n```"
    )


def _plugins(facts: RunFacts) -> Iterable[str]:
    if facts.setting("env.type") == "robomimic":
        yield "`lerobot_env_robomimic`"
    if facts.policy_type.startswith(TINY):
        yield "`lerobot_policy_vla_trqam_tiny`"


def _lerobot_eval(facts: RunFacts, repo_id: str) -> str:
    """The command that repeats the evaluation, from the same initial states."""
    flags = [f"--policy.path={repo_id}"]
    if facts.setting("env.type") is None:
        flags.append("--env.type=YOUR_ENVIRONMENT")
    else:
        flags += [f"--{name}={_flag(value)}" for name, value in _environment(facts)]
        flags.append(f"--eval.n_episodes={facts.setting('eval.episodes')}")
        flags.append(f"--seed={facts.setting('eval.first_seed')}")
    return " \\\n  ".join(["lerobot-eval", *map(shlex.quote, flags)])


def _environment(facts: RunFacts) -> Iterable[tuple[str, Any]]:
    """LeRobot's names of the settings that made the simulator."""
    own = OF_ROBOMIMIC if facts.setting("env.type") == "robomimic" else ()
    for name in ("env.type", "env.task", *own):
        if facts.setting(name) is not None:
            yield name, facts.setting(name)
    for name, value in facts.setting("env.options", {}).items():
        yield f"env.{name}", value
    yield "env.episode_length", facts.setting("eval.max_episode_steps")


def _flag(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return f"[{','.join(map(str, value))}]"
    return str(value)


def _go_on(facts: RunFacts, repo_id: str) -> str:
    pull = f"python -m vla_trqam.recipes.hub pull --repo_id={repo_id} --folder=pulled"
    lines = [
        "## Go on training",
        "`algorithm/` holds the critic and the state of the trust region.",
    ]
    if not facts.for_lerobot or facts.recipe is None:
        return "\n\n".join([*lines, f"```bash\n{pull}\n```"])
    flags = [f"--policy.path={repo_id}", f"--critic.path={repo_id}"]
    if facts.is_adapter:
        flags.append("--policy.adapter=continue")
    first, *others = (name or "USER/DATA" for name in facts.datasets)
    flags.append(f"--dataset.repo_id={first}")
    if others:
        flags.append(f"--dataset.more=[{', '.join(f'{{repo_id: {name}}}' for name in others)}]")
    train = shlex.join(["accelerate", "launch", "-q", facts.recipe, *flags])
    return "\n\n".join([*lines, f"```bash\n{pull}\n{train}\n```"])


def _how_it_was_made(facts: RunFacts) -> str:
    provenance = facts.provenance
    if provenance is None:
        return (
            "## How it was made\n\nThe run had not ended, so there is no report of it: its settings"
            f" are in `run/config.yaml`. Versions at the push: {_listed(package_versions())}."
        )
    seeds = [f"- {purpose} seed: {seed}" for purpose, seed in provenance["seeds"].items()]
    evaluation = facts.evaluation
    if evaluation is not None:
        first, last = int(evaluation.seeds.min()), int(evaluation.seeds.max())
        seeds.append(f"- initial states: {len(evaluation)} seeds, {first} to {last}")
    lines = [
        *seeds,
        f"- versions: {_listed(provenance['versions'])}",
        f"- commit of `vla_trqam`: {provenance['commit'] or 'not run from a git checkout'}",
        f"- machine: {_listed(provenance['machine'])}",
        "- every setting, every logged number and the report: `run/`",
    ]
    listing = "\n".join(lines)
    return f"## How it was made\n\n```bash\n{provenance['command']}\n```\n\n{listing}"


def _listed(values: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())


def _figures(facts: RunFacts) -> str:
    images = [f"![{caption(plot)}]({PLOTS}/{plot.name})" for plot in facts.plots]
    return "\n\n".join(["## Figures", *images]) if images else ""
