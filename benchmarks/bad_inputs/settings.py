"""Rows of the table of malformed input: flags and configuration files."""

from __future__ import annotations

from functools import partial

from bad_inputs.place import Command, Place, Row, pi0, robomimic

Flags = tuple[tuple[str, ...], str, tuple[str, ...]]
"""The flags, what is wrong with them, and words of the sentence."""

ROBOMIMIC_FLAGS: tuple[Flags, ...] = (
    (("--method.kl_bugdet=1",), "a letter off", ("--method.kl_bugdet", "--method.kl_budget?")),
    (("--nothing_like_it=1",), "an unknown flag", ("--nothing_like_it", "--help")),
    (("stray",), "a word without dashes", ("'stray'", "--name=value")),
    (("-seed=1",), "a single dash", ("'-seed=1'", "--name=value")),
    (("--=5",), "a flag without a name", ("-- is not a setting",)),
    (("--seed.first=1",), "a part of a setting that has none", ("--seed.first",)),
    (("--trqam=5",), "a number for a group of settings", ("--trqam",)),
    (("--batch_size",), "no value where a number is needed", ("--batch_size", "true")),
    (("--batch_size=true",), "true for a number", ("--batch_size", "true")),
    (("--dataset.filter_key=yes",), "a filter key that is not there", ("filter key 'yes'",)),
    (("--batch_size=many",), "a word for a number", ("batch_size", "many")),
    (("--batch_size=2.5",), "a fraction for a whole number", ("batch_size", "2.5")),
    (("--batch_size=[4,8]",), "a list for a number", ("batch_size", "[4, 8]")),
    (("--batch_size={a: 1}",), "a mapping for a number", ("batch_size", "a")),
    (("--batch_size=",), "nothing for a number", ("--batch_size", "null")),
    (("--batch_size=null",), "null where a value is needed", ("--batch_size", "null")),
    (("--batch_size=0",), "a batch of nothing", ("--batch_size=0", "at least 1")),
    (("--batch_size=-4",), "a negative batch", ("--batch_size=-4", "at least 1")),
    (("--seed=-1",), "a negative seed", ("--seed=-1",)),
    (("--seed=100000",), "a seed beyond the last", ("--seed=100000",)),
    (("--seed=1e3",), "a seed in scientific notation", ("seed", "1e3")),
    (("--seed=.nan",), "a seed that is not a number", ("seed", "nan")),
    (("--discount=1",), "a discount of 1", ("--discount=1", "between 0 and 1")),
    (("--discount=nan",), "a discount that is not a number", ("--discount=nan",)),
    (("--discount='0,99'",), "a decimal comma", ("discount", "0,99")),
    (("--resume=maybe",), "neither true nor false", ("resume", "maybe")),
    (("--resume=2",), "a number for true or false", ("resume", "2")),
    (("--policy.hidden_dims=8",), "a number for a list", ("--policy.hidden_dims=8", "[8]")),
    (("--policy.hidden_dims=[]",), "an empty list of widths", ("--policy.hidden_dims",)),
    (("--policy.hidden_dims=[8,0]",), "a layer of no width", ("--policy.hidden_dims", "0")),
    (("--policy.hidden_dims=[8,x]",), "a word in a list of numbers", ("hidden_dims", "x")),
    (("--critic.hidden_dims=[8,-1]",), "a negative width", ("--critic.hidden_dims", "-1")),
    (("--dataset.obs_keys=[]",), "no observation", ("observation key",)),
    (("--dataset.obs_keys=object",), "a name for a list of names", ("--dataset.obs_keys", "list")),
    (("--dataset.obs_keys=[sonar]",), "an observation that no demo has", ("sonar", "object")),
    (("--dataset.obs_keys=[object,object]",), "an observation twice", ("object", "twice")),
    (("--dataset.reward=much",), "an unknown reward", ("dataset.reward", "much", "sparse")),
    (("--dataset.short_chunks=maybe",), "an unknown choice", ("short_chunks", "maybe", "drop")),
    (("--dataset.filter_key=nobodys",), "an unknown filter key", ("nobodys", "worse")),
    (("--dataset.name=lift/best",), "an unknown official dataset", ("lift/best", "lift/ph")),
    (("--dataset.path=x.hdf5", "--dataset.name=lift/ph"), "two datasets", ("choose one",)),
    (("--pretrain.filter_key=nobodys",), "demos to clone of no one", ("nobodys", "worse")),
    (("--pretrain.num_demos=5",), "more demos than there are", ("--pretrain.num_demos=5", "4")),
    (("--pretrain.optimizer.lr=0",), "a step size of 0", ("lr", "0", "positive")),
    (("--pretrain.optimizer.lr=.inf",), "an infinite step size", ("lr", "inf", "finite")),
    (("--pretrain.optimizer.ema_rate=2",), "a rate above 1", ("ema_rate", "2")),
    (
        ("--method.type=fql", "--method.kl_budget=1"),
        "TRQAM's knob for FQL",
        ("kl_budget", "fql", "--method.type=trqam"),
    ),
    (("--method.type=fql", "--method.alpha=-1"), "a negative weight", ("alpha", "-1")),
    (("--method.type=ifql", "--method.kappa=1"), "an expectile of 1", ("kappa", "between 0 and 1")),
    (("--method.type=dsrl", "--method.noise_scale=0"), "a box of no width", ("noise_scale", "0")),
    (("--method.type=qam", "--method.lam_init=3"), "a dual for QAM", ("lam_init", "QAM", "trqam")),
    (("--method.type=ppo",), "an unknown method", ("method.type", "ppo", "trqam", "qam")),
    (("--method.inverse_temperature=2",), "QAM's knob for TRQAM", ("inverse_temperature", "qam")),
    (("--method.kl_budget=0",), "a budget of 0", ("kl_budget", "0", "positive")),
    (("--method.kl_budget=nan",), "a budget that is not a number", ("kl_budget", "nan")),
    (("--method.kl_budget=.inf",), "an infinite budget", ("kl_budget", "inf", "finite")),
    (("--method.actor_lr=.inf",), "an infinite step size of the policy", ("actor_lr", "finite")),
    (("--method.max_grad_norm=-1",), "a negative clip", ("max_grad_norm", "-1", "positive")),
    (("--method.scheme=euler",), "an unknown chain", ("scheme", "euler", "posterior")),
    (("--method.adjoint=exact",), "an unknown adjoint", ("adjoint", "exact", "lean", "scalar")),
    (
        ("--method.scheme=posterior", "--method.time_shift=0.5"),
        "the other chain's knob",
        ("time_shift", "shifted_euler"),
    ),
    (
        ("--method.scheme=shifted_euler", "--method.time_shift=0"),
        "a shift of 0",
        ("time_shift", "0"),
    ),
    (
        ("--method.scheme=posterior", "--method.last_step_weight=0"),
        "a last step that weighs nothing",
        ("last_step_weight", "0"),
    ),
    (
        ("--method.scheme=posterior", "--policy.num_flow_steps=1"),
        "a chain without a noisy step",
        ("num_flow_steps", "1"),
    ),
    (("--method.final_step=loud",), "an unknown last step", ("final_step", "loud")),
    (("--critic.target_rate=0",), "a target that never moves", ("--critic.target_rate=0",)),
    (("--critic.pessimism=.inf",), "infinite pessimism", ("--critic.pessimism=inf",)),
    (("--critic.ensemble_size=0",), "no critic", ("--critic.ensemble_size=0", "at least 1")),
    (
        ("--steps=0", "--base_run=some/run"),
        "nothing to train",
        ("--steps", "--online.steps", "both 0"),
    ),
    (("--online.fraction=1.5",), "a share above 1", ("--online.fraction=1.5",)),
    (("--lr_end=0",), "no step size left", ("--lr_end=0.0", "(0, 1]")),
    (("--policy.chunk_length=11",), "a chunk longer than an episode", ("10", "11")),
    (
        ("--policy.n_action_steps=99",),
        "more than a chunk executed",
        ("99", "--policy.chunk_length"),
    ),
    (("--eval.first_seed=499999",), "initial states of training", ("--eval.first_seed=499999",)),
    (("--eval.videos=-1",), "a negative number of videos", ("--eval.videos=-1",)),
    (("--num_threads=0",), "no thread", ("--num_threads=0", "at least 1")),
    (("--kernels=slow",), "unknown kernels", ("kernels", "slow", "fast, plain")),
    (
        ("--method.type=ifql", "--critic.adjoint_pessimism=1"),
        "a knob of the critic that the method never reads",
        ("ifql", "--critic.adjoint_pessimism"),
    ),
    (
        ("--offline.steps=5", "--steps=5"),
        "a setting by its former name too",
        ("--offline.steps is the former name of --steps",),
    ),
    (("--preset=huge",), "an unknown preset", ("--preset=huge", "default", "full", "paper")),
    (("--preset=full", "--config_path=x"), "a preset and a file", ("choose one",)),
    (("--config_path=nowhere.yaml",), "no such file of settings", ("nowhere.yaml", "read")),
    (("--config_path=.",), "a folder for a file of settings", ("cannot be read",)),
)

PI0_FLAGS: tuple[Flags, ...] = (
    (("--policy.paht=x",), "a letter off", ("--policy.paht", "--policy.path?")),
    (("--policy.path=null",), "a dataset without a policy", ("--policy.path", "go together")),
    (("--dataset.repo_id=null",), "a policy without a dataset", ("--dataset.repo_id",)),
    (("--steps=0",), "nothing to train", ("--steps", "--online.steps", "both 0")),
    (("--online.steps=5",), "rollouts without a simulator", ("--online.steps=5", "--env.type")),
    (("--base_episodes=5",), "episodes without a simulator", ("--base_episodes=5", "--env.type")),
    (("--micro_batches=5",), "more parts than a batch has", ("--micro_batches=5", "--batch_size")),
    (("--critic.next_actions=0",), "no next action", ("--critic.next_actions=0",)),
    (("--critic.warmup_steps=-1",), "a negative warm-up", ("--critic.warmup_steps=-1",)),
    (("--peft.method=ia3",), "an unknown kind of adapters", ("peft.method", "ia3", "lora")),
    (("--peft.r=0",), "adapters of rank 0", ("--peft.r=0", "at least 1")),
    (("--peft.lora_alpha=0",), "adapters of no scale", ("--peft.lora_alpha=0", "at least 1")),
    (("--peft.target_modules=nothing",), "adapters in no module", ("target_modules", "nothing")),
    (("--peft.target_modules=(",), "no regular expression", ("target_modules", "(")),
    (
        ("--peft.target_modules='.*language_model.*q_proj'",),
        "adapters in the prefix",
        ("which is not in the action expert",),
    ),
    (("--policy.adapter=keep",), "an unknown use of adapters", ("policy.adapter", "keep", "merge")),
    (("--policy.device=abacus",), "no such device", ("--policy.device=abacus",)),
    (("--policy.device=cuda:99",), "a device that is not here", ("--policy.device=cuda:99",)),
    (("--policy.critic_layer=99",), "a layer beyond the last", ("critic_layer", "99")),
    (("--policy.n_action_steps=0",), "no action executed", ("n_action_steps", "0")),
    (
        ("--policy.n_action_steps=3",),
        "decisions between two frames",
        ("frames lie 4 steps apart", "a multiple of 4"),
    ),
    (("--policy.n_action_steps=99",), "more than a chunk executed", ("99", "8")),
    (("--prefix_cache=some",), "an unknown cache", ("prefix_cache", "some", "auto")),
    (("--method.loss_steps=0",), "a loss on no step", ("loss_steps", "0", "at least 1")),
    (
        ("--method.clone_interventions=1",),
        "interventions that nothing tells of",
        ("--method.clone_interventions", "intervention or is_intervention"),
    ),
    (
        ("--dataset.intervention_weight=0",),
        "interventions that are never drawn",
        ("dataset.intervention_weight", "0", "at least 1"),
    ),
    (
        ("--dataset.intervention_weight=2",),
        "a weight of what nothing tells of",
        ("--dataset.intervention_weight", "intervention or is_intervention"),
    ),
    (
        ("--dataset.reward=progress",),
        "progress of no column",
        ("--dataset.reward=progress", "--dataset.reward_column"),
    ),
    (
        ("--dataset.reward_file=sarm_progress.parquet",),
        "a file without its column",
        ("sarm_progress.parquet", "--dataset.reward_column"),
    ),
    (("--peft.shard=true",), "adapters in parts", ("--peft.shard=true", "--peft.method=full")),
    (
        ("--peft.method=full", "--peft.shard=true"),
        "parts of the weights for one process",
        ("one process only",),
    ),
    (
        ("--peft.method=full", "--peft.shard=true", "--policy.compile=true"),
        "parts of the weights, and compiled",
        ("--peft.shard=true and --policy.compile=true",),
    ),
    (("--policy.cuda_graphs=true",), "CUDA graphs on a CPU", ("the policy is on cpu", "leave it")),
    (
        ("--policy.cuda_graphs=true", "--policy.compile=true"),
        "replayed, and compiled",
        ("--policy.cuda_graphs=true and --policy.compile=true",),
    ),
    (
        ("--policy.cuda_graphs=true", "--method.keep_activations=false"),
        "replayed, and computed again",
        ("--policy.cuda_graphs=true", "--method.keep_activations=false"),
    ),
    (
        ("--policy.cuda_graphs=true", "--method.type=fql"),
        "a path replayed by a method that has none",
        ("--method.type=fql has no use for --policy.cuda_graphs",),
    ),
    (
        ("--peft.method=full", "--peft.shard=true", "--method.type=dsrl"),
        "a method that trains none of the policy's weights, in parts",
        ("--peft.shard=true", "dsrl", "trqam, qam"),
    ),
    (("--prefix_cache_gib=0",), "a budget of nothing", ("--prefix_cache_gib=0", "positive")),
    (("--prefix_cache_gib=1e-6",), "no room for one batch", ("--prefix_cache_gib", "one batch")),
    (
        ("--prefix_cache=disk", "--prefix_cache_gib=2e-4"),
        "no room for all frames",
        ("--prefix_cache=disk", "--prefix_cache=auto"),
    ),
    (
        ("--prefix_cache=none", "--prefix_cache_gib=1"),
        "a budget of what is not kept",
        ("--prefix_cache=none", "leave one of both out"),
    ),
    (("--replay.frames=some",), "an unknown place of frames", ("replay.frames", "some", "copy")),
    (("--policy.push_to_hub=true",), "a push to nowhere", ("--policy.repo_id=USER/NAME",)),
    (
        ("--policy.push_to_hub=true", "--policy.repo_id=some/one"),
        "a push of adapters of a local base",
        ("--policy.merged=true",),
    ),
    (
        ("--policy.push_to_hub=true", "--policy.repo_id=some/one", "--peft.method=full"),
        "a push without a token",
        ("some/one", "HF_TOKEN"),
    ),
    (
        ("--policy.push_to_hub=true", "--policy.repo_id=one", "--peft.method=full"),
        "a push to half a name",
        ("repo_id=one", "USER/NAME"),
    ),
    (
        ("--policy.push_to_hub=true", "--policy.repo_id=some/one", "--method.type=fql"),
        "a push of what LeRobot does not load",
        ("networks beside it",),
    ),
    (("--method.train_base=true",), "a frozen base in training", ("frozen", "trqam")),
    (("--dataset.more=[{root: x}]",), "a further dataset without a name", ("more[0]", "repo_id")),
    (("--dataset.columns=[nothing]",), "a further column that is not there", ("nothing",)),
    (("--rename_map=[front,top]",), "a list for a map", ("rename_map",)),
    (("--rename_map={front: top}",), "a camera that is not there", ("--rename_map", "front")),
    (("--dataset.root=nowhere",), "no such dataset", ("nowhere", "meta/info.json")),
    (("--dataset.episodes=0",), "a number for a list", ("--dataset.episodes=0", "[0]")),
    (("--dataset.episodes=[]",), "no episode", ("--dataset.episodes",)),
    (("--dataset.episodes=[0,999]",), "an episode beyond the last", ("999", "119")),
    (("--dataset.episodes=[-1]",), "a negative episode", ("-1", "119")),
    (("--dataset.episodes=[0,0]",), "an episode twice", ("--dataset.episodes", "once")),
    (("--dataset.reward=great",), "an unknown reward", ("dataset.reward", "great")),
    (("--dataset.kind=great",), "an unknown kind of reward", ("dataset.kind", "great", "sparse")),
    (("--env.type=atari",), "an unknown simulator", ("env.type", "atari", "robomimic")),
    (("--env.type=robomme",), "a simulator that no seed moves", ("env.type=robomme", "every seed")),
    (("--env.task=Tennis",), "an unknown task", ("env.task", "Tennis", "Lift")),
    (
        ("--env.type=robomimic", "--env.cameras=[front]"),
        "a camera that the policy does not know",
        ("--env.cameras=[front]", "agentview"),
    ),
    (
        ("--env.type=robomimic", "--base_episodes=2", "--env.image_size=32"),
        "pictures of another size",
        ("agentview", "96", "--env.image_size=32"),
    ),
    (("--critic.path=/nowhere",), "no such critic", ("--critic.path=/nowhere",)),
    (("--preset=paper",), "the other recipe's preset", ("--preset=paper", "own")),
)

FILES: tuple[tuple[str | bytes, str, tuple[str, ...]], ...] = (
    ("seed: [1", "settings that are not YAML", ("cannot be read",)),
    ("", "an empty file of settings", ("YAML mapping",)),
    ("- 1\n- 2\n", "a list for settings", ("YAML mapping",)),
    (b"\xff\xfe\x00\x01", "a binary file for settings", ("cannot be read",)),
    ("seeed: 1\n", "an unknown setting in a file", ("seeed", "seed?")),
    ("trqam: {kl_bugdet: 1}\n", "an unknown setting in a group", ("method.kl_budget?",)),
    ("trqam: 1\n", "a number for a group in a file", ("trqam",)),
    ("1: 2\n", "a setting named by a number", ("1",)),
    ("batch_size: null\n", "null in a file", ("--batch_size", "null")),
    ("dataset: {obs_keys: object}\n", "a name for a list in a file", ("obs_keys", "list")),
    ("seed: !!python/object/apply:os.getpid []\n", "a call in a file", ("cannot be read",)),
    ("seed: 1\nseed: 2\n", "a setting twice in a file", ("seed", "twice")),
)


def _flags(flags: tuple[str, ...], place: Place) -> Command:
    return robomimic(place, *flags)


def _pi0_flags(flags: tuple[str, ...], place: Place) -> Command:
    return pi0(place, *flags)


def _file(content: str | bytes, place: Place) -> Command:
    flags = (f"--config_path={place.write('settings.yaml', content)}", "--output_dir=run")
    return Command("finetune_robomimic", flags)


def _below_a_file(place: Place) -> Command:
    return robomimic(place, f"--output_dir={place.write('file', 'keep me') / 'below'}")


ROWS = (
    *(
        Row("settings", f"`{' '.join(flags)}`: {wrong}", partial(_flags, flags), words)
        for flags, wrong, words in ROBOMIMIC_FLAGS
    ),
    *(
        Row("settings of π0", f"`{' '.join(flags)}`: {wrong}", partial(_pi0_flags, flags), words)
        for flags, wrong, words in PI0_FLAGS
    ),
    *(
        Row("file of settings", wrong, partial(_file, content), ("<settings.yaml>", *words))
        for content, wrong, words in FILES[:4]
    ),
    *(
        Row("file of settings", wrong, partial(_file, content), words)
        for content, wrong, words in FILES[4:]
    ),
    Row("settings", "a folder below a file", _below_a_file, ("--output_dir=", "<file>")),
)
