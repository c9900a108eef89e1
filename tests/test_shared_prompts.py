"""hidden_states computes equal prompts once; log-probs and gradients are those of a plain pass."""

import math
import sys
import types
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from conftest import ARGS, CPU, SHAPE, distance, gradients, precise

import common
import dpo
import grpo
import ppo
import reward_model
import rloo
import sft

# prompts of unequal length, one with a single completion; window of Gemma 2 and 3: 8
PROMPTS = [11, 12, 15, 11]
COMPLETIONS = [[3, 9, 1], [5, 5], [1], [7, 2, 4, 6]]
ARCHITECTURES = ["llama", "gpt2", "gemma2", "gemma3", "neox", "qwen3"]


def make_rollouts(seed=0, prompts=PROMPTS, completions=COMPLETIONS):
    """Rollouts of random letters, grouped by prompt."""
    rng = torch.Generator().manual_seed(seed)

    def letters(number):
        return torch.randint(4, 30, (number,), generator=rng).tolist()

    rollouts = []
    for length, group in zip(prompts, completions, strict=True):
        prompt_ids = letters(length)
        rollouts += [{"prompt_ids": prompt_ids, "completion_ids": letters(n)} for n in group]
    return rollouts


def load_policy(folder, **changes):
    args = SimpleNamespace(**vars(ARGS) | changes)
    return common.load_policy(str(folder), sft.tiny_tokenizer(), args, CPU, trainable=True)


class Passes:
    """Sizes of the inputs of a model's forward passes."""

    def __init__(self, model):
        self.sizes = []
        model.base_model.register_forward_pre_hook(self.record, with_kwargs=True)

    def record(self, module, args, kwargs):
        self.sizes.append(tuple(kwargs["input_ids"].shape))

    @property
    def tokens(self):
        return sum(rows * columns for rows, columns in self.sizes)


def weighted_logprobs(model, batch):
    """Log-probs, and the gradient of their sum with weights that differ for every token."""
    logprobs, _ = grpo.token_logprobs_and_entropy(model, batch, 0.7)
    (logprobs * torch.linspace(-1, 1, logprobs.numel()).view(logprobs.shape)).sum().backward()
    return logprobs.detach(), gradients(model)


def assert_shared_is_plain(function, model, batch):
    """function(model, batch) -> values, gradient is the same in one pass and in two."""
    tolerance = 1e-4 if next(model.parameters()).dtype == torch.float32 else 1e-6
    passes = Passes(model)
    values, gradient = function(model, batch)
    assert len(passes.sizes) == 2 and passes.tokens < batch["inputs"].numel()
    expected, expected_gradient = function(model, dict(batch, prompt_length=batch["mask"][:, 0]))
    assert len(passes.sizes) == 3 and passes.sizes[2] == batch["inputs"].shape
    assert expected.abs().max() > 0.1 and expected_gradient.norm() > 0.1
    torch.testing.assert_close(values, expected, rtol=tolerance, atol=tolerance)
    assert distance(gradient, expected_gradient) < tolerance


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("rows", ["all", "some"])
def test_logprobs_and_gradients(name, rows, tiny_dirs):
    """Rows of all groups in order, or a shuffled minibatch with parts of the groups."""
    model = precise(load_policy(tiny_dirs[name]))
    batch = grpo.completion_batch(make_rollouts(), CPU)
    if rows == "some":
        batch = common.take(batch, torch.tensor([7, 0, 5, 9, 2, 6]))
    assert_shared_is_plain(weighted_logprobs, model, batch)


@pytest.mark.parametrize("rope_type", ["llama3", "yarn", "linear"])
def test_scaled_positions(rope_type):
    """Models with scaled rotary positions."""
    scaling = {
        "llama3": dict(low_freq_factor=1.0, high_freq_factor=4.0, factor=8.0),
        "yarn": dict(factor=4.0),
        "linear": dict(factor=4.0),
    }[rope_type]
    rope = dict(rope_type=rope_type, rope_theta=100.0, **scaling)
    if rope_type != "linear":
        rope["original_max_position_embeddings"] = 8
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SHAPE, rope_parameters=rope, initializer_range=0.3)
    model = common.prepare(transformers.LlamaForCausalLM(config), ARGS, CPU, trainable=True)
    assert_shared_is_plain(
        weighted_logprobs,
        precise(model),
        grpo.completion_batch(make_rollouts(), CPU),
    )


def test_tokens_are_computed_once(tiny_dirs):
    """Two prompts of 6, three completions of up to 5: 2 * 5 + 6 * (1 + 4) tokens."""
    model = load_policy(tiny_dirs["llama"])
    rollouts = make_rollouts(prompts=[6, 6], completions=[[5, 2, 1], [3, 5, 4]])
    passes = Passes(model)
    grpo.token_logprobs_and_entropy(model, grpo.completion_batch(rollouts, CPU))
    assert passes.sizes == [(2, 5), (6, 5)]


@pytest.mark.parametrize(
    "prompts, completions",
    [
        ([6, 7, 6], [[5], [2], [3]]),  # no prompt has two completions
        ([1, 6], [[5, 2], [3, 4]]),  # the shortest prompt is one token
    ],
)
def test_one_pass_if_nothing_is_shared(prompts, completions, tiny_dirs):
    model = load_policy(tiny_dirs["llama"])
    batch = grpo.completion_batch(make_rollouts(0, prompts, completions), CPU)
    passes = Passes(model)
    grpo.token_logprobs_and_entropy(model, batch)
    assert passes.sizes == [tuple(batch["inputs"].shape)]


def test_one_pass_with_gradient_checkpointing(tiny_dirs):
    """A recomputed layer would write to the cache again."""
    batch = grpo.completion_batch(make_rollouts(), CPU)
    model = load_policy(tiny_dirs["llama"], gradient_checkpointing=True)
    passes = Passes(model)
    _, gradient = weighted_logprobs(model, batch)
    assert passes.sizes == [tuple(batch["inputs"].shape)]
    _, expected = weighted_logprobs(load_policy(tiny_dirs["llama"]), batch)
    assert distance(gradient, expected) < 1e-4


def test_one_pass_under_torchrun(tiny_dirs, monkeypatch):
    """FSDP needs the same number of forward passes on all ranks."""
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_dirs["llama"])
    monkeypatch.setattr(common, "world_size", lambda: 2)
    monkeypatch.setattr(common, "shard", lambda model, device: model)
    assert not common.prepare(model, ARGS, CPU, trainable=True).can_share_prompts


@pytest.mark.parametrize("config", ["Mamba2Config", "JambaConfig"])
def test_one_pass_for_recurrent_states(config):
    """Not all recurrent layers continue from a state with more than one token."""
    sizes = dict(vocab_size=30, hidden_size=32, num_hidden_layers=2, num_heads=4, head_dim=16)
    config = getattr(transformers, config)(**sizes, n_groups=1, state_size=8)
    model = SimpleNamespace(
        config=config,
        eval=lambda: None,
        requires_grad_=lambda trainable: None,
        to=lambda device: model,
    )
    assert not common.prepare(model, ARGS, CPU, trainable=False).can_share_prompts


def test_pairs_share_their_prompt(tiny_dirs):
    """Chosen and rejected, in dpo.py and in reward_model.py."""
    model = precise(load_policy(tiny_dirs["llama"]))
    rollouts = make_rollouts(completions=[[4, 6], [1, 8], [5, 5], [2, 1]])
    pairs = [
        chosen | {"chosen_ids": chosen["completion_ids"], "rejected_ids": rejected, "margin": 0.0}
        for chosen, rejected in zip(
            rollouts[::2], [x["completion_ids"] for x in rollouts[1::2]], strict=True
        )
    ]
    assert_shared_is_plain(weighted_logprobs, model, dpo.pair_batch(pairs, CPU))


@pytest.mark.parametrize("function", [reward_model.token_scores, ppo.token_values])
def test_scores_and_values(function, tiny_dirs):
    torch.manual_seed(1)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        tiny_dirs["llama"], num_labels=1
    )
    torch.nn.init.normal_(model.score.weight)
    model = precise(common.prepare(model, ARGS, CPU, trainable=True))
    if function is ppo.token_values:
        batch = ppo.completion_batch(make_rollouts(), CPU)
    else:
        groups = make_rollouts(completions=[[4, 6], [1, 8], [5, 5], [2, 1]])
        examples = [
            {
                "prompt_ids": group[0]["prompt_ids"],
                "completion_ids": [x["completion_ids"] for x in group],
                "ends": [[len(x["completion_ids"]) - 1] for x in group],
                "labels": [[1.0], [0.0]],
                "margin": 0.0,
            }
            for group in zip(groups[::2], groups[1::2], strict=True)
        ]
        batch = reward_model.score_batch(examples, CPU)

    def weighted(model, batch):
        values = function(model, batch)
        (values * torch.linspace(-1, 1, values.numel()).view(values.shape)).sum().backward()
        return values.detach(), gradients(model)

    assert_shared_is_plain(weighted, model, batch)


# ---------------------------------------------------------------- completions without gradient
SKIP = 'minibatch = take(minibatch, minibatch["advantages"].any(1).nonzero()[:, 0])'
REWARD = """
def score(prompts, completions, rows):
    # the groups of a> and c> are equal
    scores = [float(len(set(text)) % 3) + i % 2 for i, text in enumerate(completions)]
    return [EQUAL if prompt[0] in "ac" else x for prompt, x in zip(prompts, scores)]

def equal(prompts, completions, rows):
    return [0.5 for _ in prompts]
"""


def without_skip(script, monkeypatch):
    """A copy of a script that computes all completions."""
    source = Path(script.__file__).read_text()
    assert source.count(SKIP) == 1
    module = types.ModuleType("plain")
    monkeypatch.setitem(sys.modules, "plain", module)
    exec(source.replace(SKIP, "pass"), module.__dict__)
    return module


def one_step(script, folder, model, monkeypatch, function="score", **flags):
    """Metrics, gradients of all updates, and the number of completions of all micro-batches."""
    folder.mkdir()
    (folder / "rows.jsonl").write_text("\n".join(f'{{"prompt": "{x}>"}}' for x in "abcd"))
    (folder / "reward.py").write_text(REWARD.replace("EQUAL", "0.5"))
    updates = []
    counts = []
    clip_gradients = script.clip_gradients
    logprobs_and_entropy = script.token_logprobs_and_entropy

    def spy_clip(model, max_norm):
        updates.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
        return clip_gradients(model, max_norm)

    def spy(model, batch, temperature):
        if torch.is_grad_enabled():
            counts.append(int(batch["mask"].any(1).sum()))
        return logprobs_and_entropy(model, batch, temperature)

    with monkeypatch.context() as patch:
        patch.setattr(script, "clip_gradients", spy_clip)
        patch.setattr(script, "token_logprobs_and_entropy", spy)
        args = script.Args(
            model=model,
            dataset=str(folder / "rows.jsonl"),
            reward=f"{folder / 'reward.py'}:{function}",
            output_dir=str(folder / "run"),
            steps=1,
            prompts_per_step=4,
            num_generations=6,
            max_completion_length=6,
            learning_rate=0.0,  # all minibatches have the gradients of one model
            **flags,
        )
        metrics = {name: float(x) for name, x in script.main(args).items()}
        return metrics, updates, sum(counts)


@pytest.mark.parametrize(
    "script, flags, num_computed",
    [
        (grpo, dict(kl_coef=0.0), 12),
        (grpo, dict(kl_coef=0.0, loss_aggregation="constant", scale_rewards="none"), 12),
        (grpo, dict(kl_coef=0.0, loss_aggregation="token", num_minibatches=3), 12),
        (grpo, dict(kl_coef=0.05), 24),
        (grpo, dict(kl_coef=0.05, kl_estimator="k1", num_minibatches=2, reference="qwen2"), 24),
        (rloo, dict(kl_coef=0.0), 12),
        (rloo, dict(kl_coef=0.05, reference="qwen2"), 24),
    ],
)
def test_completions_without_gradient_are_skipped(  # noqa: PLR0917
    script, flags, num_computed, tiny_dirs, tmp_path, monkeypatch
):
    """Two of four groups have equal scores; the gradients are those of all completions."""
    model = tiny_dirs["llama"]
    if "reference" in flags:  # a KL that is not 0
        flags = flags | {"reference": tiny_dirs[flags["reference"]]}
    metrics, updates, count = one_step(script, tmp_path / "a", model, monkeypatch, **flags)
    plain = without_skip(script, monkeypatch)
    expected, plain_updates, plain_count = one_step(
        plain, tmp_path / "b", model, monkeypatch, **flags
    )
    assert count == num_computed and plain_count == 24
    assert len(updates) == len(plain_updates) == flags.get("num_minibatches", 1)
    for ours, theirs in zip(updates, plain_updates, strict=True):
        assert theirs.norm() > 0.01
        assert (ours - theirs).norm() < 1e-4 * theirs.norm()
    assert metrics["loss"] == pytest.approx(expected["loss"], rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("script", [grpo, rloo])
def test_a_step_of_equal_groups(script, tiny_dirs, tmp_path, monkeypatch):
    """Nothing is computed and the gradient is 0."""
    metrics, (gradient,), count = one_step(
        script, tmp_path / "a", tiny_dirs["llama"], monkeypatch, function="equal", kl_coef=0.0
    )
    assert count == 0 and not gradient.any()
    assert metrics["loss"] == metrics["grad_norm"] == 0 and math.isnan(metrics["entropy"])


# ---------------------------------------------------------------- rows that depend on each other
def long_rope(context=64):
    """A tiny Phi 3 whose positions are scaled beyond 16 tokens."""
    factors = dict(short_factor=[1.0] * 4, long_factor=[4.0] * 4)
    return transformers.Phi3Config(
        **SHAPE | {"max_position_embeddings": context},
        rope_parameters=dict(rope_type="longrope", rope_theta=100.0, **factors),
        original_max_position_embeddings=16,
        initializer_range=0.3,
    )


def test_long_rope_is_refused_beyond_its_original_context(tmp_path, capsys):
    """A longer row would change the log-probs of the rows beside it."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(long_rope())
    model.save_pretrained(tmp_path)
    sft.tiny_tokenizer().save_pretrained(tmp_path)
    policy = load_policy(tmp_path)
    short, long = [{"prompt_ids": [5] * 3, "completion_ids": [*range(4, 4 + n)]} for n in (8, 20)]
    alone, beside = [
        grpo.token_logprobs_and_entropy(policy, grpo.completion_batch(rows, CPU))[0][0, :10]
        for rows in ([short], [short, long])
    ]
    assert (alone - beside).abs().max() > 0.01  # what the check is for
    common.check_fit(str(tmp_path), [[5] * 16])
    with pytest.raises(SystemExit):
        common.check_fit(str(tmp_path), [[5] * 17])
    assert "17 tokens exceed its context of 16" in capsys.readouterr().err
