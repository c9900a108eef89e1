"""Tiny random models of several architectures, loaded from disk as the scripts load theirs."""

import copy
import os
import sys
from pathlib import Path
from types import SimpleNamespace

os.environ["HF_HUB_OFFLINE"] = "1"  # no test reaches for the network
sys.path.insert(0, str(Path(__file__).parents[1]))

import background
import pytest
import torch
import transformers

import common
import grpo
import sft

torch.set_num_threads(1)  # these models are too small to share; on a busy machine it is far faster

CPU = torch.device("cpu")
VOCAB = 64
NAMES = ["llama", "gemma2", "gpt2", "neox", "qwen2"]
MORE = ["qwen3", "gemma3"]  # for the sampler alone
SHAPE = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
SHAPE |= dict(
    vocab_size=VOCAB, max_position_embeddings=64, bos_token_id=None, pad_token_id=0, eos_token_id=1
)


COPY = SimpleNamespace(path=None, like=None)  # --script and --like, see docs/extend.md


def pytest_addoption(parser):
    parser.addoption("--script", type=Path, help="copy of a script to test (docs/extend.md)")
    parser.addoption("--like", help="script that --script is a copy of, such as grpo")


def pytest_configure(config):
    COPY.path = config.option.script
    COPY.like = config.option.like
    if COPY.path is None and COPY.like is None:
        return
    root = Path(__file__).parents[1]
    if COPY.path is None or not COPY.path.exists() or not (root / f"{COPY.like}.py").exists():
        raise pytest.UsageError("needs --script FILE and --like NAME, such as grpo")
    sys.path.insert(0, str(COPY.path.resolve().parent))


def pytest_collection_modifyitems(config, items):
    """With --script, keep the tests of test_steps.py and test_family.py that apply to the copy."""
    if COPY.path is not None:
        others = [item for item in items if not is_of_copy(item)]
        config.hook.pytest_deselected(items=others)
        items[:] = [item for item in items if is_of_copy(item)]


def is_of_copy(item):
    if item.module.__name__ not in ("test_steps", "test_family"):
        return False
    parameters = item.callspec.params.values() if hasattr(item, "callspec") else []
    names = [getattr(parameter, "__name__", parameter) for parameter in parameters]
    return COPY.path.stem in names or item.name.startswith(f"test_{COPY.like}_")


def pytest_collection_finish(session):
    if not session.config.option.collectonly:
        background.start(session.items)


def pytest_sessionfinish(session):
    background.end()


def tiny_config(name):
    """Wide weights, so distributions are far from flat and depend on the context."""
    if name == "llama":
        return transformers.LlamaConfig(**SHAPE, num_key_value_heads=2, initializer_range=0.3)
    if name == "gemma2":  # prompts longer than the window, logits well over the cap
        special = dict(
            head_dim=8, sliding_window=8, final_logit_softcapping=2.0, initializer_range=0.5
        )
        return transformers.Gemma2Config(**SHAPE, num_key_value_heads=2, **special)
    if name == "gpt2":  # learned positions, and dropout in the configuration
        ids = {
            key: SHAPE[key]
            for key in ("vocab_size", "bos_token_id", "pad_token_id", "eos_token_id")
        }
        dropout = dict(resid_pdrop=0.1, embd_pdrop=0.1, attn_pdrop=0.1)
        shape = dict(n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.3)
        return transformers.GPT2Config(**ids, **dropout, **shape)
    if name == "neox":
        return transformers.GPTNeoXConfig(**SHAPE, initializer_range=0.3)
    if name == "qwen2":
        return transformers.Qwen2Config(**SHAPE, num_key_value_heads=2, initializer_range=0.3)
    if name == "qwen3":
        return transformers.Qwen3Config(
            **SHAPE, num_key_value_heads=2, head_dim=16, initializer_range=0.3
        )
    if name == "gemma3":  # one windowed layer, one that sees all
        layers = dict(
            layer_types=["sliding_attention", "full_attention"], sliding_window=8, head_dim=8
        )
        return transformers.Gemma3TextConfig(
            **SHAPE, **layers, num_key_value_heads=2, initializer_range=0.1
        )


def save_tiny(name, folder):
    """A model and its tokenizer."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(tiny_config(name))
    for key, weight in model.named_parameters():  # GPT-2 and GPT-NeoX start with biases of 0
        if key.endswith("bias"):
            torch.nn.init.normal_(weight, std=0.3)
    model.save_pretrained(folder)
    sft.tiny_tokenizer().save_pretrained(folder)


@pytest.fixture(scope="session")
def tiny_dirs(tmp_path_factory):
    """Architecture -> directory of a model in safetensors and its tokenizer."""
    dirs = {name: str(tmp_path_factory.mktemp(name)) for name in NAMES + MORE}
    for name, folder in dirs.items():
        save_tiny(name, folder)
    return dirs


ARGS = SimpleNamespace(dtype="float32", gradient_checkpointing=False, micro_batch_tokens=4096)


def load_policy(path):
    """The model of a directory as a script trains it."""
    tokenizer = common.load_tokenizer(str(path))
    return common.load_policy(str(path), tokenizer, ARGS, CPU, trainable=True)


def eos_ids_of(tokenizer, folder, configured=None):
    """EOS ids of a policy with this tokenizer and these EOS ids in its generation config."""
    shape = SHAPE | {"vocab_size": max(VOCAB, len(tokenizer)), "eos_token_id": None}
    config = transformers.LlamaConfig(**shape, num_key_value_heads=2)
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.generation_config.eos_token_id = configured
    model.save_pretrained(folder)
    policy = common.load_policy(str(folder), tokenizer, ARGS, CPU)
    return policy.generation_config.eos_token_id


def load_tiny(name):
    @pytest.fixture(scope="session", name=f"tiny_{name}")
    def tiny(tiny_dirs):
        return load_policy(tiny_dirs[name])

    return tiny


tiny_llama, tiny_gemma2, tiny_gpt2, tiny_neox, tiny_qwen2 = map(load_tiny, NAMES)
tiny_qwen3, tiny_gemma3 = map(load_tiny, MORE)


@pytest.fixture(params=NAMES)
def policy(request):
    """Each tiny model in turn, as a policy in training; tests leave it without gradients."""
    return request.getfixturevalue(f"tiny_{request.param}")


@pytest.fixture(params=NAMES + MORE)
def sampled(request):
    """Each model that is sampled from."""
    return request.getfixturevalue(f"tiny_{request.param}")


def random_head(model, has_new_head=True):
    """A random score head, as in reward_model.py."""
    if has_new_head:
        torch.nn.init.normal_(model.score.weight, std=0.2, generator=common.generator(1, "head"))


@pytest.fixture(scope="session")
def scorers(tiny_dirs):
    """Architecture -> model with a random scalar head, in training."""
    return {
        name: common.load_scorer(path, ARGS, CPU, trainable=True, init=random_head)
        for name, path in tiny_dirs.items()
    }


@pytest.fixture(params=NAMES)
def scorer(request, scorers):
    """Each model with a scalar head in turn."""
    return scorers[request.param]


def ragged_ids(seed, shape=((3, 7), (9, 1), (1, 12), (5, 4), (12, 2), (3, 7))):
    """Prompts and completions of very different lengths with any ids, PAD and EOS included."""
    draw = torch.Generator().manual_seed(seed)
    ids = [[torch.randint(VOCAB, (n,), generator=draw).tolist() for n in pair] for pair in shape]
    return [p for p, _ in ids], [c for _, c in ids]


def as_rollouts(prompts, completions):
    """Rollouts with these token ids; EOS is 1."""
    return [
        {"prompt_ids": prompt, "completion_ids": ids, "finished": ids[-1:] == [1]}
        for prompt, ids in zip(prompts, completions)
    ]


def ragged_batch(seed):
    return grpo.completion_batch(as_rollouts(*ragged_ids(seed)), CPU)


def at_last_token(batch):
    """The batch with a mask that is 1 at the last token of each row."""
    mask = batch["attention_mask"]
    return batch | {"mask": mask * (mask.cumsum(1) == mask.sum(1, keepdim=True))}


def gradients(model):
    """All gradients of a model as one float64 vector; they are reset."""
    parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    model.zero_grad(set_to_none=True)
    return torch.cat([part.flatten() for part in parts]).double()


def precise(model):
    """A copy in float64, where equal gradients agree to 1e-15 rather than 1e-6.

    Gemma 2 stays in float32: its attention computes the softmax in float32, in which the lowest
    float64 number of a mask is -inf."""
    return (
        copy.deepcopy(model)
        if model.config.model_type == "gemma2"
        else copy.deepcopy(model).double()
    )


def distance(a, b):
    """|a - b| / |b|."""
    return ((a - b).norm() / b.norm()).item()


def end_two_of_three(patch, script):
    """Patch `sample` of a script: every third completion has no EOS, the others end with it."""
    inner = script.sample

    def sample(*args, **kwargs):
        rollouts = inner(*args, **kwargs)
        for i, rollout in enumerate(rollouts):
            ids = rollout["completion_ids"]
            rollout["finished"] = i % 3 != 0
            rollout["completion_ids"] = (
                [*ids[:-1], 1]
                if rollout["finished"]
                else [5 if token == 1 else token for token in ids]
            )
        return rollouts

    patch.setattr(script, "sample", sample)
