"""Code shared by all scripts: models, data, sampling, rewards, runs. Methods are in the scripts.

1. command line  2. processes  3. models  4. the built-in task  5. data
6. batches  7. sampling  8. rewards  9. runs on disk"""

import contextlib
import functools
import hashlib
import importlib.util
import inspect
import itertools
import json
import math
import os
import random
import re
import signal
import sys
import zlib
from datetime import datetime
from pathlib import Path

import torch
import transformers
import tyro
from jinja2 import TemplateError
from torch import distributed, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers.cache_utils import DynamicLayer
from transformers.modeling_layers import GradientCheckpointingLayer

transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
IS_CUDA = torch.cuda.is_available()


# ---------------------------------------------------------------- 1. command line
# Flags that may change at --resume. A fingerprint of the run covers model and dataset.
MAY_CHANGE = set(
    "resume overwrite output_dir model dataset eval_dataset steps epochs iterations eval_every "
    "save_every log_every micro_batch_tokens gradient_checkpointing".split()
)


def fail(message):
    """Exit with status 2 and a one-line error message."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def cli(Args, laptop):
    """Command line -> Args. Defaults: the demo's without --model, saved flags with --resume."""
    is_laptop = "--model" not in " ".join(sys.argv)
    defaults = Args(**laptop) if is_laptop else Args()
    args = tyro.cli(Args, default=defaults, description=sys.modules[Args.__module__].__doc__)
    if args.resume:
        saved = json.loads(Path(args.output_dir, "args.json").read_text())
        args = tyro.cli(Args, default=Args(**saved))
    elif is_laptop and {args.dataset, args.eval_dataset} - {TASK, None}:
        fail("--dataset and --eval-dataset need --model: the demo model only knows `sort`")
    elif is_laptop:
        print("flags: the defaults of the demo (with --model: published values, for a GPU)")
    return args


def setup(args):
    """Check --output-dir, join the process group, resolve automatic flags. Returns the device."""
    folder = Path(args.output_dir)
    names = [path.name for path in folder.glob("*")]
    if names and not ("args.json" in names and (args.resume or args.overwrite)):
        fail(f"--output-dir {folder} is not empty: use another, or --resume or --overwrite a run")
    device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if IS_CUDA else "cpu")
    if IS_CUDA:
        torch.cuda.set_device(device)
    if world_size() > 1 and not distributed.is_initialized():
        # gloo reduces CPU tensors, which NCCL cannot
        distributed.init_process_group("cpu:gloo,cuda:nccl" if IS_CUDA else "gloo")
        if rank() > 0:
            sys.stdout = open(os.devnull, "w")
    args.micro_batch_tokens = args.micro_batch_tokens or (16_384 if IS_CUDA else 1024)
    if args.dtype == "auto":  # emulated bfloat16, as on older GPUs, is slower than float32
        has_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
        args.dtype = "bfloat16" if has_bfloat16 else "float32"
    print(f"device: {device}; weights: float32; compute: {args.dtype}")
    if args.resume and names:
        saved = json.loads((folder / "args.json").read_text())
        changed = {name for name in saved if saved[name] != getattr(args, name)} - MAY_CHANGE
        if changed:
            fail(f"--resume: --{min(changed).replace('_', '-')} cannot change")
    return device


def generator(seed, *purpose):
    """A torch.Generator seeded from its arguments, so there is no RNG state to checkpoint."""
    digest = hashlib.sha256(repr((seed, *purpose)).encode()).hexdigest()
    return torch.Generator().manual_seed(int(digest[:15], 16))


# ---------------------------------------------------------------- 2. processes
# No-ops in a single process. Under torchrun, models are sharded (FSDP2), each rank takes a share of
# every batch, and losses and metrics are summed over ranks, so N ranks compute what one does.
def rank():
    return int(os.environ["RANK"]) if distributed.is_torchelastic_launched() else 0


def world_size():
    return int(os.environ["WORLD_SIZE"]) if distributed.is_torchelastic_launched() else 1


def all_reduce(value, op="sum"):
    """Sum (or "max") of a number or tensor over all ranks."""
    if world_size() == 1:
        return value
    total = torch.as_tensor(value).clone()
    distributed.all_reduce(total, getattr(distributed.ReduceOp, op.upper()))
    return total if isinstance(value, torch.Tensor) else total.item()


def broadcast_from_rank0(function):
    """Call function() on rank 0 and return its result on every rank."""
    result = [function() if rank() == 0 else None]
    if world_size() > 1:
        distributed.broadcast_object_list(result)
    return result[0]


def shard(model, device):
    """Move a model to its device; under torchrun, shard it layer by layer (FSDP2)."""
    if world_size() == 1:
        return model.to(device)
    mesh = distributed.init_device_mesh(device.type, (world_size(),))
    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    for module in [*layers, model]:
        fully_shard(module, mesh=mesh, reshard_after_forward=True)
        # sum gradients over ranks: the weights of a loss carry the normalizer of the whole batch
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    model.run = lambda function, *args, **kwargs: function(model, *args, **kwargs)
    register_fsdp_forward_method(model, "run")
    return model


def model_forward(function):
    """Decorator for functions that call submodules: autocast, and weights gathered by FSDP."""

    @functools.wraps(function)
    def run(model, *args, **kwargs):
        with autocast(model):
            if isinstance(model, FSDPModule):
                return model.run(function, *args, **kwargs)
            return function(model, *args, **kwargs)

    return run


def autocast(model):
    """An autocast context. It caches bfloat16 weights: exit it before an optimizer step."""
    is_bfloat16 = model.compute_dtype == "bfloat16"
    return torch.autocast(model.device.type, torch.bfloat16, enabled=is_bfloat16)


@contextlib.contextmanager
def unsharded(model):
    """Keep a model unsharded while it samples, so ranks do not synchronize at every token."""
    shards = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for module in shards:
        module.set_reshard_after_forward(False)
        module.unshard()
    yield
    for module in shards:
        module.set_reshard_after_forward(True)
        module.reshard()


def clip_gradients(model, max_norm):
    """Clip the gradient norm to max_norm (0: no limit). Returns the norm before clipping.

    Raises RuntimeError if the norm is not finite."""
    norm = nn.utils.clip_grad_norm_(
        model.parameters(),
        max_norm or math.inf,
        error_if_nonfinite=True,
    )
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


# ---------------------------------------------------------------- 3. models
def load_tokenizer(path):
    """The tokenizer of a directory or Hub id. PAD defaults to EOS."""
    if path.startswith("runs/") and not Path(path).exists():
        fail(f"{path} does not exist (runs/NAME is written by `python NAME.py`)")
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    if tokenizer.eos_token is None:
        fail(f"{path}: the tokenizer has no EOS token")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


@functools.cache
def special_tokens(tokenizer):
    """Text -> id of the special tokens of a tokenizer."""
    tokens = tokenizer.added_tokens_decoder.items()
    return {token.content: token_id for token_id, token in tokens if token.special}


@functools.cache
def end_of_turn_id(tokenizer):
    """Id of the token that ends a completion: the end of a chat turn, otherwise EOS."""
    if tokenizer.chat_template is None:
        return tokenizer.eos_token_id
    messages = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "good-bye"}]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False)
    except (TemplateError, TypeError):  # it only renders other conversations
        text = ""
    ids = tokenizer(text.partition("good-bye")[2], add_special_tokens=False).input_ids
    special = special_tokens(tokenizer).values()
    return next((x for x in ids if x in special), tokenizer.eos_token_id)


def context_of(config):
    """Maximum sequence length of a model, infinity if its config does not say.

    LongRoPE (Phi 3): the original context. A longer row changes the positions of its batch."""
    config = config.get_text_config()
    original = getattr(config, "original_max_position_embeddings", None)
    return original or getattr(config, "max_position_embeddings", None) or math.inf


def check_fit(path, sequences, max_new_tokens=0):
    """Fail if a sequence exceeds the context of a model, or a token id its vocabulary."""
    config = transformers.AutoConfig.from_pretrained(path).get_text_config()
    longest = max(map(len, sequences)) + max_new_tokens
    if longest > context_of(config):
        fail(f"{path}: {longest} tokens exceed its context of {context_of(config)} (--max-*length)")
    if max(map(max, sequences)) >= config.vocab_size:
        fail(f"{path}: the tokenizer has ids beyond the vocabulary; resize the embeddings")


def load_weights(cls, path, has_new_head=False, **options):
    """A model with float32 weights. Fails on missing or unexpected ones, except a new head."""
    model, info = cls.from_pretrained(
        path,
        dtype=torch.float32,
        use_safetensors=True,  # nothing is unpickled
        output_loading_info=True,
        **options,
    )
    names = {*info["missing_keys"], *info["unexpected_keys"]}
    if has_new_head:
        names = {name for name in names if name.startswith(f"{model.base_model_prefix}.")}
    if names:
        fail(f"{path}: checkpoint and {type(model).__name__} differ in {min(names)}")
    return model


def prepare(model, args, device, trainable):
    """Freeze or unfreeze a model, set its compute dtype, move it to its device."""
    model.eval()  # no dropout: with it, the ratio before the first update would not be 1
    model.requires_grad_(trainable)
    is_checkpointed = trainable and args.gradient_checkpointing
    # torch's checkpoint: transformers' own needs train mode, which turns dropout on
    for module in model.modules() if is_checkpointed else []:
        if isinstance(module, GradientCheckpointingLayer):
            module.forward = functools.partial(checkpoint, module.forward, use_reentrant=False)
    model.compute_dtype = args.dtype
    # no sharing: a recomputed layer would write to its cache twice, and FSDP needs equal passes
    can_share = world_size() == 1 and not is_checkpointed
    layers = transformers.DynamicCache(config=model.config).layers
    model.can_share_prompts = can_share and all(isinstance(x, DynamicLayer) for x in layers)
    return shard(model, device)


def load_policy(path, tokenizer, args, device, trainable=False):
    """A causal language model with float32 weights.

    Its generation config has all EOS ids, without the checkpoint's top-k and top-p."""
    model = load_weights(transformers.AutoModelForCausalLM, path)
    check_head(model, path)
    configured = model.generation_config.eos_token_id
    configured = configured if isinstance(configured, list) else [configured]
    eos_ids = {tokenizer.eos_token_id, end_of_turn_id(tokenizer), *configured}
    model.generation_config = transformers.GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=sorted(eos_ids - {None}),
    )
    return prepare(model, args, device, trainable)


def load_scorer(path, args, device, trainable=False, init=None):
    """A sequence classifier with one output and float32 weights.

    init(model, has_new_head) is called before sharding. Without init, a new head is an error."""
    architectures = transformers.AutoConfig.from_pretrained(path).architectures
    has_new_head = "SequenceClassification" not in str(architectures)
    if init is None and has_new_head:
        fail(f"{path} is not a reward model: train one with reward_model.py")
    model = load_weights(
        transformers.AutoModelForSequenceClassification, path, has_new_head, num_labels=1
    )
    if init is not None:
        init(model, has_new_head)
    return prepare(model, args, device, trainable)


def head_logits(model, hidden):
    """Float32 logits, scaled and capped as in model.forward. Shapes: (N, H) -> (N, V)."""
    config = model.config.get_text_config()
    logits = model.get_output_embeddings()(hidden).float()
    if getattr(config, "logits_scaling", None):  # Granite
        logits = logits / config.logits_scaling
    if getattr(config, "logit_scale", None):  # Cohere
        logits = logits * config.logit_scale
    cap = getattr(config, "final_logit_softcapping", None)
    if cap:  # Gemma 2 and later
        logits = torch.tanh(logits / cap) * cap
    return logits


def hidden_states(model, batch):
    """Last hidden states where the mask is 1, row by row. Shapes: batch of (B, T) -> (N, H).

    Let n be the length of the shortest prompt minus one. Rows that begin with the same n tokens
    share them: they go through the model once, and each row continues from a copy of their cache.
    Gradients flow through the copies. The mask must be 0 in the first n columns."""
    inputs = batch["inputs"]
    n = 0
    cache = None
    if "prompt_length" in batch and model.can_share_prompts:
        n = max(0, int(batch["prompt_length"].min()) - 1)
    prompts, row = inputs[:, : n + 1].unique(dim=0, return_inverse=True)  # (P, n + 1), (B,)
    if len(prompts) == len(inputs):
        n = 0
    if n > 0:
        cache = transformers.DynamicCache(config=model.config)
        model.base_model(input_ids=prompts[:, :n], cache=cache)
        cache.reorder_cache(row)
    outputs = model.base_model(
        input_ids=inputs[:, n:],
        attention_mask=batch["attention_mask"],
        cache=cache,
        use_cache=n > 0,
    )
    return outputs.last_hidden_state[batch["mask"][:, n:].bool()]


@torch.no_grad()
def check_head(model, path):
    """Fail if head_logits differs from model.forward, as for an unknown logit transform."""
    ids = torch.arange(4)[None]
    expected = model(input_ids=ids).logits.float()
    actual = head_logits(model, model.base_model(input_ids=ids).last_hidden_state)
    if not torch.allclose(actual, expected, rtol=1e-3, atol=1e-3):
        fail(f"{path}: head_logits does not match the logits of {type(model).__name__}")


# ---------------------------------------------------------------- 4. the built-in task
# Sort 4 to 7 distinct letters: prompt `dbca>`, answer `abcd`.
TASK = "sort"
LETTERS = "abcdefghijklmnopqrstuvwxyz"
TASK_ROWS = {"sft": 165, "pairs": 40_000, "prompts": 20_000, "held out": 500}


def task_rows(kind, held_out, seed):
    """Rows of the built-in task. Whether letters are held out depends on these letters alone."""
    rng = random.Random(f"{'held out' if held_out else seed}/{kind == 'pairs'}")
    num_rows = TASK_ROWS["held out" if held_out else kind]
    rows = []
    while len(rows) < num_rows:
        letters = "".join(rng.sample(LETTERS, rng.randint(4, 7)))
        if (zlib.crc32(letters.encode()) % 8 == 0) != held_out:
            continue
        answer = "".join(sorted(letters))
        row = {"prompt": f"{letters}>", "answer": answer}
        if kind == "pairs":
            row |= {"chosen": answer, "rejected": wrong_answer(answer, rng)}
        rows.append(row)
    return rows


def wrong_answer(answer, rng):
    """The answer with a letter replaced, inserted or dropped, usually still in order."""
    wrong = answer
    while wrong == answer:
        i = rng.randrange(len(answer))
        letter = rng.choice(LETTERS)
        wrong = answer[:i] + rng.choice([letter, letter + answer[i], ""]) + answer[i + 1 :]
        if rng.random() < 0.6:
            wrong = "".join(sorted(wrong))
    return wrong


def task_checker(prompts, completions, rows):
    """1.0 for the sorted letters followed by EOS, otherwise 0.0."""
    return [
        float(row["finished"] and text.strip() == row["answer"])
        for text, row in zip(completions, rows)
    ]


# ---------------------------------------------------------------- 5. data
PROMPT_COLUMNS = ["prompt", "instruction", "question"]
COMPLETION_COLUMNS = ["completion", "output", "answer"]
ROLES = ["system", "developer", "user", "assistant", "tool"]


class DroppedRow(Exception):
    """A valid row that would have to be truncated or changed; skipped and counted."""


def load_examples(dataset, kind, make_example, tokenizer, args, held_out=False):  # noqa: PLR0917
    """Read and tokenize a dataset.

    kind ("sft", "pairs" or "prompts") selects the rows of the built-in task. make_example(row,
    tokenizer, args) returns an example, a dict, to which `row` and `where` are added. It raises
    DroppedRow to skip a row and ValueError to stop the run. It sees no null columns."""
    rows = task_rows(kind, held_out, args.seed) if dataset == TASK else read_rows(dataset)
    examples = []
    dropped = {}  # reason -> where
    for number, row in enumerate(rows, 1):
        where = f"{dataset} row {number}"
        try:
            line = row if isinstance(row, str) else json.dumps(row, default=str)
            columns = json.loads(line, object_hook=without_nulls)
            example = {"row": json.loads(line), "where": where}
            examples.append(example | make_example(columns, tokenizer, args))
        except DroppedRow as reason:
            dropped.setdefault(str(reason), []).append(where)
        except (AttributeError, LookupError, TypeError, ValueError, TemplateError) as error:
            fail(f"{where}: {type(error).__name__}: {error}")
    print(f"{dataset}: {len(examples)} rows")
    for reason, places in dropped.items():
        print(f"{dataset}: dropped {len(places)} rows: {reason}, first at {places[0]}")
    if not examples:
        fail(f"{dataset}: no usable rows")
    return examples


def without_nulls(columns):
    """Columns, or keys of a message, without null and []: Arrow and chat logs fill them in."""
    return {name: value for name, value in columns.items() if value not in (None, [])}


def load_held_out(examples, kind, make_example, tokenizer, args):
    """Examples of --eval-dataset or the held-out rows of the built-in task, otherwise []."""
    if args.eval_dataset is None and args.dataset != TASK:
        return []
    dataset = args.eval_dataset or TASK
    held_out = load_examples(dataset, kind, make_example, tokenizer, args, held_out=True)
    prompts = {str(example["prompt"]) for example in examples}
    num_trained = sum(str(example["prompt"]) in prompts for example in held_out)
    if num_trained:
        print(f"{dataset}: {num_trained} prompts are also in the training data")
    return held_out


def read_rows(dataset):
    """Lines of a .jsonl file, rows of a .json file, or rows read by the datasets package.

    The latter are .csv and .parquet files, or Hub ids: name, name:split or name:config:split."""
    suffix = Path(dataset).suffix
    if suffix in (".json", ".jsonl"):
        if not Path(dataset).exists():
            fail(f"{dataset} does not exist")
        text = Path(dataset).read_text(encoding="utf-8-sig")
        return json.loads(text) if suffix == ".json" else text.strip().split("\n")
    if importlib.util.find_spec("datasets") is None:
        fail(f"{dataset}: formats other than .jsonl and .json need `pip install datasets`")
    import datasets

    if suffix in (".csv", ".parquet"):
        return list(datasets.load_dataset(suffix[1:], data_files=dataset, split="train"))
    name, *config = dataset.split(":")
    split = config.pop() if config else "train"
    return list(datasets.load_dataset(name, *config, split=split))


def text_or_messages(row, names):
    """The first of these columns that a row has: text, or a list of {"role", "content"}."""
    found = [row[name] for name in names if name in row]
    if not found:
        raise ValueError(f"no column of {names}; found {list(row)}")
    for message in found[0] if isinstance(found[0], list) else []:
        if message["role"] not in ROLES:
            raise ValueError(f"unknown role: {message}")
    return found[0]


def prompt_of(row, args):
    """The prompt of a row: a column, or --prompt-template filled in with columns."""
    if args.prompt_template == "{prompt}":
        return text_or_messages(row, PROMPT_COLUMNS)
    if isinstance(row.get("prompt"), list):
        raise ValueError("--prompt-template is for text, but `prompt` is a list of messages")
    # in single quotes, a shell passes \n as two characters
    return args.prompt_template.replace("\\n", "\n").format_map(row)


def prompt_example(row, tokenizer, args):
    """A prompt. A reward function gets all columns."""
    prompt = prompt_of(row, args)
    prompt_ids, _ = encode_completions(tokenizer, prompt, [])
    if len(prompt_ids) > args.max_prompt_length:
        raise DroppedRow(f"longer than --max-prompt-length {args.max_prompt_length}")
    return {"prompt": prompt, "prompt_ids": prompt_ids}


def encode_completions(tokenizer, prompt, completions):
    """Token ids of a prompt, and of each of its completions with one EOS.

    Prompt and completion are tokenized as one text and split after the tokens of the prompt, so
    the boundary is the one the model sees when it samples."""
    if not isinstance(prompt, str):
        check_messages(tokenizer, prompt, completions)
    prompt_ids, *sequences = encode(tokenizer, prompt, [None, *completions])
    if isinstance(prompt, str) and not prompt.endswith(tokenizer.eos_token):
        if prompt_ids[-1:] == [tokenizer.eos_token_id]:
            prompt_ids.pop()  # some tokenizers append EOS to every text
    if not prompt_ids:
        raise DroppedRow("an empty prompt")
    n = len(prompt_ids)
    if any(ids[:n] != prompt_ids for ids in sequences):
        raise DroppedRow("prompt not a token prefix of prompt + completion (check the template)")
    return prompt_ids, [end_with_eos(tokenizer, ids[n:], prompt) for ids in sequences]


def encode(tokenizer, prompt, completions):
    """Token ids of prompt + completion, for each completion (None: of the prompt to complete)."""
    texts = [render(tokenizer, prompt, completion) for completion in completions]
    # a chat template writes BOS itself, and a text may begin with it
    has_bos = tokenizer.bos_token and texts[0].startswith(tokenizer.bos_token)
    add_special_tokens = isinstance(prompt, str) and not has_bos
    return tokenizer(texts, add_special_tokens=add_special_tokens, verbose=False).input_ids


def render(tokenizer, prompt, completion):
    """Text of prompt + completion; messages go through the chat template."""
    if isinstance(prompt, str):
        return prompt + (completion or "")
    if completion is None:
        text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        given = [message["content"].strip() for message in prompt if message["role"] != "assistant"]
        if any(content not in text for content in given):
            raise ValueError("the chat template drops the text of a message")
        return text
    if isinstance(completion, str):
        completion = [{"role": "assistant", "content": completion}]
    return tokenizer.apply_chat_template(prompt + completion, tokenize=False)


def check_messages(tokenizer, prompt, completions):
    """Reject messages that a model must not be trained on or prompted with."""
    answers = [message for c in completions if isinstance(c, list) for message in c]
    for message in prompt + answers:
        if "tool_calls" in message or not isinstance(message.get("content"), str):
            raise DroppedRow("a message without plain text for the chat template")
    if any(message["role"] != "assistant" for message in answers):
        raise DroppedRow("a completion with a message that is not from the assistant")
    if prompt[-1]["role"] == "assistant" and not answers:
        raise ValueError("the prompt ends with an assistant message")
    if any(token in str([prompt, completions]) for token in special_tokens(tokenizer)):
        raise DroppedRow("a message that contains a special token of the tokenizer")


def end_with_eos(tokenizer, ids, prompt):
    """Completion ids with exactly one EOS, without what a chat template writes after the turn."""
    end_id = end_of_turn_id(tokenizer)
    if isinstance(prompt, list) and end_id in ids:
        return ids[: len(ids) - ids[::-1].index(end_id)]
    if ids[-1:] in ([end_id], [tokenizer.eos_token_id]):
        return ids
    return [*ids, end_id]


def shuffled_examples(examples, seed, start, stop):
    """Examples start to stop - 1 of an endless stream that is reshuffled every epoch."""
    n = len(examples)
    order = []
    for epoch in range(start // n, (stop - 1) // n + 1):
        order += torch.randperm(n, generator=generator(seed, "shuffle", epoch)).tolist()
    return [examples[i] for i in order[start % n :][: stop - start]]


# ---------------------------------------------------------------- 6. batches
SMALL_BATCH = 4096 if IS_CUDA else 512  # tokens; smaller batches are no faster


def pad_rows(rows, device, side="right"):
    """Lists of numbers -> (B, T), padded with 0."""
    return pad_sequence(
        [torch.tensor(row) for row in rows],
        batch_first=True,
        padding_side=side,
    ).to(device)


def take(batch, rows):
    """Some rows of every tensor of a batch, cut to the longest of these rows.

    No rows: two dummy rows of mask 0, since FSDP needs equal forward passes on all ranks."""
    if len(rows) == 0:
        batch = {name: torch.zeros_like(x) for name, x in batch.items()}
        batch["attention_mask"][:, 0] = 1
        rows = [0, 0]
    width = batch["attention_mask"][rows].sum(1).max()
    return {name: x[rows, :width] if x.ndim == 2 else x[rows] for name, x in batch.items()}


def micro_batch_rows(batch, max_tokens):
    """Lists of rows, one per micro-batch of this rank; the last lists may be empty.

    Rows are sorted by length, and a micro-batch above SMALL_BATCH has rows of similar length. Rows
    of one batch["group"] are adjacent and stay together."""
    lengths = batch["attention_mask"].sum(1).tolist()
    group = batch["group"].tolist() if "group" in batch else range(len(lengths))
    groups = [list(rows) for _, rows in itertools.groupby(range(len(lengths)), group.__getitem__)]
    groups = [(max(lengths[row] for row in rows), rows) for rows in groups]
    groups.sort(key=lambda pair: -pair[0])
    lists = []
    width = 0
    for length, rows in groups[rank() :: world_size()]:
        tokens = width * (len(lists[-1]) + len(rows)) if lists else math.inf
        if tokens > max_tokens or (tokens > SMALL_BATCH and length < 0.9 * width):
            lists.append([])
            width = length
        lists[-1] += rows
    return lists + [[]] * (all_reduce(len(lists), op="max") - len(lists))


def micro_batches(batch, max_tokens):
    """Micro-batches of at most max_tokens tokens with padding, or one longer row or group."""
    for rows in micro_batch_rows(batch, max_tokens):
        yield take(batch, rows)


@torch.no_grad()
def in_micro_batches(function, model, batch, max_tokens, *options):
    """function(model, micro_batch, *options) for a whole batch, without gradient, on every rank.

    Shapes: results (b, t) -> (B, T), 0 elsewhere."""
    result = torch.zeros_like(batch["inputs"], dtype=torch.float32)
    with autocast(model):
        for rows in micro_batch_rows(batch, max_tokens):
            values = function(model, take(batch, rows), *options)
            result[rows, : values.shape[1]] = values[: len(rows)]
    return all_reduce(result)


# ---------------------------------------------------------------- 7. sampling
TOKEN_BUDGET = 262_144 if IS_CUDA else 65_536


@torch.no_grad()
def sample(
    policy,
    examples,
    *,
    num_generations=1,
    max_new_tokens,
    temperature=1.0,
    rng,
    token_budget=TOKEN_BUDGET,
):
    """Sample from softmax(logits / temperature): no top-k, no top-p. Temperature 0 is greedy.

    Returns P * num_generations rollouts, grouped by example: the example with completion_ids up to
    the first EOS and finished (False if max_new_tokens came first). Each row and position has its
    own random number, so results depend neither on token_budget nor on ranks."""
    prompts = [example["prompt_ids"] for example in examples]
    eos_ids = policy.generation_config.eos_token_id
    shape = (len(prompts), num_generations, max_new_tokens)
    noise = torch.rand(shape, generator=rng, dtype=torch.float64)
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))[rank() :: world_size()]
    max_tokens = num_generations * (max(map(len, prompts)) + max_new_tokens)  # of one prompt
    prompts_at_a_time = max(1, token_budget // max_tokens)
    tokens = torch.zeros(shape, dtype=torch.long, device=policy.device)
    with unsharded(policy), autocast(policy):
        for start in range(0, len(order), prompts_at_a_time):
            indices = order[start : start + prompts_at_a_time]
            rows = sample_rows(
                policy,
                [prompts[i] for i in indices],
                noise[indices].flatten(0, 1).to(policy.device),
                temperature,
                torch.tensor(eos_ids, device=policy.device),
            )
            tokens[indices] = rows.view(len(indices), num_generations, max_new_tokens)
    rollouts = []
    for example, group in zip(examples, all_reduce(tokens).tolist()):
        for ids in group:
            length = next((t + 1 for t, token in enumerate(ids) if token in eos_ids), None)
            completion = {"completion_ids": ids[:length], "finished": length is not None}
            rollouts.append(example | completion)
    return rollouts


def sample_rows(model, prompts, noise, temperature, eos_ids):
    """Sample completions of P prompts; tokens after EOS are arbitrary.

    Each prompt, left-padded, is prefilled once, and its completions start from copies of its cache.
    Finished rows are dropped once they are a quarter of the batch.
    Shapes: noise (B, max_new_tokens) -> (B, max_new_tokens)."""
    device = noise.device
    B, max_new_tokens = noise.shape
    inputs = pad_rows(prompts, device, side="left")
    attention_mask = pad_rows([[1] * len(ids) for ids in prompts], device, side="left")
    # learned positions (GPT-2) must not count the padding
    position_ids = (attention_mask.cumsum(1) - 1).clamp(min=0)
    cache = transformers.DynamicCache(config=model.config)
    tokens = torch.zeros(B, max_new_tokens, dtype=torch.long, device=device)
    row = torch.arange(B, device=device)  # the row of `tokens` of each row of the cache
    finished = torch.zeros(B, dtype=torch.bool, device=device)
    for t in range(max_new_tokens):
        step = model.prepare_inputs_for_generation(
            inputs,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            use_cache=True,
            logits_to_keep=1,
            is_first_iteration=t == 0,
        )
        logits = model(**step).logits[:, -1]
        if t == 0:
            prompt = row // (B // len(prompts))
            cache.reorder_cache(prompt)
            logits = logits[prompt]
            attention_mask = attention_mask[prompt]
            position_ids = position_ids[prompt, -1:]
        token = sample_tokens(logits.float(), temperature, noise[row, t])
        tokens[row, t] = token
        finished = finished | torch.isin(token, eos_ids)
        num_finished = int(finished.sum())
        if num_finished == len(row):
            break
        attention_mask = nn.functional.pad(attention_mask, (0, 1), value=1)
        position_ids = position_ids + 1
        if num_finished >= len(row) / 4:
            unfinished = (~finished).nonzero()[:, 0]
            cache.reorder_cache(unfinished)
            attention_mask = attention_mask[unfinished]
            position_ids = position_ids[unfinished]
            token = token[unfinished]
            row = row[unfinished]
            finished = finished[unfinished]
        inputs = token[:, None]
    return tokens


def sample_tokens(logits, temperature, noise):
    """Sample by inverting the CDF. Shapes: logits (b, V), uniform noise (b,) -> (b,)."""
    if temperature == 0:
        return logits.argmax(-1)
    cdf = (logits / temperature).softmax(-1).cumsum(-1, dtype=torch.float64)
    # right=True: never sample a token of probability 0
    token = torch.searchsorted(cdf, noise[:, None] * cdf[:, -1:], right=True)[:, 0]
    return token.clamp(max=logits.shape[-1] - 1)


def completion_text(tokenizer, rollout):
    """decode(prompt + completion) minus decode(prompt). Alone, it could lose a leading space."""
    prompt_ids = rollout["prompt_ids"]
    options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    text = tokenizer.decode(prompt_ids + rollout["completion_ids"], **options)
    return text[len(tokenizer.decode(prompt_ids, **options)) :]


# ---------------------------------------------------------------- 8. rewards
NUMBER = r"-?\d[\d,]*(?:\.\d+)?"


def gsm8k_number(text, is_reference=False):
    """The answer of a worked solution, None if there is none; nothing is evaluated.

    The first number after the last `####` or in the last \\boxed{}, otherwise the last number. A
    reference must have nothing but a number there, or be a number."""
    text = re.sub(r"\{,\}|\\,|\\!|\$", "", text).replace("−", "-")  # LaTeX thousands separators, $
    marked = re.findall(r"####([^\n]*)|\\boxed\{((?:[^{}]|\{[^{}]*\})*)\}", text)
    answer = "".join(marked[-1]) if marked else text
    if is_reference and not re.fullmatch(rf"\s*{NUMBER}[\s.%]*", answer):
        return None
    found = re.findall(NUMBER, answer)[:1] if marked else []
    found = found or re.findall(NUMBER, text)[-1:]
    return float(found[0].replace(",", "")) if found else None


def gsm8k_checker(prompts, completions, rows):
    """1.0 if a completion has the number of column `answer`, otherwise 0.0 (Cobbe et al. 2021)."""
    answers = [gsm8k_number(str(row["answer"]), is_reference=True) for row in rows]
    return [float(a is not None and gsm8k_number(c) == a) for c, a in zip(completions, answers)]


CHECKERS = {TASK: task_checker, "gsm8k": gsm8k_checker}  # both read the column `answer`


def checker_reward(function, tokenizer):
    """Turn function(prompts, completions, rows) into reward(rollouts) -> scores (B,) on the CPU.

    None becomes NaN: no score. Only rank 0 calls the function."""

    def reward(rollouts):
        prompts = [rollout["prompt"] for rollout in rollouts]
        texts = [completion_text(tokenizer, rollout) for rollout in rollouts]
        rows = [rollout["row"] | {"finished": rollout["finished"]} for rollout in rollouts]
        with contextlib.chdir("."), torch.no_grad():  # restored if the function changes them
            scores = broadcast_from_rank0(lambda: list(function(prompts, texts, rows)))
        if len(scores) != len(rollouts):
            fail(f"--reward must return {len(rollouts)} scores, one per completion")
        return torch.tensor([math.nan if x is None else float(x) for x in scores])

    return reward


def vocabulary(path):
    """The (token, id) pairs of a tokenizer and the rows of an embedding, as one set.

    A model can read the ids of a policy if its vocabulary contains the policy's."""
    num_embeddings = transformers.AutoConfig.from_pretrained(path).get_text_config().vocab_size
    return {*load_tokenizer(path).get_vocab().items(), *range(num_embeddings)}


@model_forward
def last_token_scores(model, batch):
    """The float32 score head at the last token. Shapes: batch of (B, T) -> (B, 1).

    The last token is found by length. transformers looks for PAD, which can be sampled."""
    hidden = hidden_states(model, batch)  # (B, H): mask is 1 at the last token
    return (hidden.float() * model.score.weight[0]).sum(-1, keepdim=True)


def model_reward(path, args, examples, policy_tokenizer, device):
    """A reward model as reward(rollouts) -> scores (B,) float32 on the CPU.

    If its tokens or its chat template differ from the policy's, it gets text (messages: its own
    template)."""
    tokenizer = load_tokenizer(path)
    model = load_scorer(path, args, device)
    has_policy_tokens = (
        vocabulary(args.model) <= vocabulary(path)
        and tokenizer.chat_template == policy_tokenizer.chat_template
    )
    if getattr(model.config, "step_separator", None):
        fail(f"{path} is a process reward model: see docs/recipes.md")

    def ids_of(rollout):
        """Ids of prompt and completion in the tokens of the reward model."""
        if has_policy_tokens:
            return rollout["prompt_ids"] + rollout["completion_ids"]
        text = completion_text(policy_tokenizer, rollout)
        for token in special_tokens(tokenizer):  # spelled out, so it cannot end the turn
            text = text.replace(token, " ".join(token))
        (ids,) = encode(tokenizer, rollout["prompt"], [text])
        ids = end_with_eos(tokenizer, ids, rollout["prompt"])
        return ids if rollout["finished"] else ids[:-1]

    def reward(rollouts):
        sequences = [ids_of(rollout) for rollout in rollouts]
        batch = {
            "inputs": pad_rows(sequences, device),
            "attention_mask": pad_rows([[1] * len(ids) for ids in sequences], device),
            "mask": pad_rows([[0] * (len(ids) - 1) + [1] for ids in sequences], device),
        }
        scores = in_micro_batches(last_token_scores, model, batch, args.micro_batch_tokens)
        return scores[:, 0].cpu()

    empty = {"completion_ids": [], "finished": False}
    check_fit(path, [ids_of(example | empty) for example in examples], args.max_completion_length)
    return reward


def load_reward(args, examples, tokenizer, device):
    """--reward as a function: rollouts -> scores (B,) on the CPU, NaN where there is no score.

    Its members, separated by commas, are reward models, checkers, file.py:function or none. The
    scores of an ensemble (Coste et al. 2023, section 3) are combined as --reward-combine says and
    kept as `member_scores` of each rollout. The members must share origin and scale, or "min"
    always picks the same one."""
    if args.reward is None:
        fail("--reward is missing: a reward model, sort, gsm8k or file.py:function")
    members = []
    for name in args.reward.split(","):
        if args.reward == "none":  # for distillation, where the KL is the only signal
            members.append(lambda rollouts: torch.zeros(len(rollouts)))
        elif name in CHECKERS or ".py:" in name:
            members.append(checker_reward(load_checker(name, examples), tokenizer))
        else:
            members.append(model_reward(name, args, examples, tokenizer, device))

    def reward(rollouts):
        scores = torch.stack([member(rollouts) for member in members])  # (members, B)
        for rollout, member_scores in zip(rollouts, scores.T):
            rollout["member_scores"] = member_scores
        if args.reward_combine == "min":
            return scores.amin(0)
        if args.reward_combine == "mean-minus-std":  # the paper subtracts the variance
            return scores.mean(0) - args.reward_std_coef * scores.std(0, correction=0)
        return scores.mean(0)

    return reward


def load_checker(name, examples):
    """A built-in checker, or a function of a Python file, which may import its neighbors."""
    if name not in CHECKERS:
        path, function_name = name.rsplit(":", 1)
        sys.path.append(os.path.abspath(os.path.dirname(path)))
        spec = importlib.util.spec_from_file_location(f"reward_{zlib.crc32(path.encode())}", path)
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # a process pool finds its functions there
        with contextlib.chdir("."), torch.no_grad():
            spec.loader.exec_module(module)
        function = getattr(module, function_name)
        try:
            inspect.signature(function).bind([], [], [])
        except TypeError as error:
            fail(f"--reward {name} must take prompts, completions, rows: {error}")
        return function
    for example in examples:
        answer = example["row"].get("answer")
        rows = [{"answer": answer, "finished": True}]
        if CHECKERS[name]([""], [str(answer)], rows) != [1.0]:
            fail(f"{example['where']}: --reward {name} finds no answer in {answer!r}")
    return CHECKERS[name]


def member_metrics(rollouts):
    """Mean score of each ensemble member and their disagreement; {} for one member."""
    scores = torch.stack([rollout["member_scores"] for rollout in rollouts], dim=1)  # (members, B)
    if len(scores) == 1:
        return {}
    metrics = {f"score/{i}": member.nanmean() for i, member in enumerate(scores, 1)}
    return metrics | {"disagreement": scores.std(0, correction=0).nanmean()}


def load_gold(args, dataset, tokenizer):
    """{"gold": reward} with the exact checker of a dataset or of --reward, {} if there is none."""
    name = dataset if dataset in CHECKERS else getattr(args, "reward", None)
    return {"gold": checker_reward(CHECKERS[name], tokenizer)} if name in CHECKERS else {}


# ---------------------------------------------------------------- 9. runs
FULL_STATE_DICT = StateDictOptions(full_state_dict=True, cpu_offload=True)


def is_due(every, step, steps):
    """True every `every` steps (0: never) and after the last step."""
    return step == steps or (every > 0 and step % every == 0)


def fingerprint(examples, models):
    """Digest of data and initial weights, independent of the number of ranks."""
    rows = repr([example["row"] for example in examples])
    weights = [x.to_local() if isinstance(x, DTensor) else x for x in models.parameters()]
    bits = sum(int(x.detach().view(torch.int32).sum(dtype=torch.int64)) for x in weights)
    return hashlib.sha256(rows.encode()).hexdigest() + str(all_reduce(bits))


class Run:
    """An output directory and a progress bar.

    The directory holds args.json, metrics.jsonl, samples.jsonl, checkpoint/ and the final model.
    Only rank 0 writes. Data order and random numbers are functions of seed and step, so a
    checkpoint is the step, the models, the optimizer and the sizes of the logs."""

    def __init__(self, args, models, optimizer, tokenizer, steps, examples):  # noqa: PLR0917
        self.args = args
        self.models = models
        self.optimizer = optimizer
        self.tokenizer = tokenizer
        self.steps = steps
        self.dir = Path(args.output_dir)
        self.checkpoint = self.dir / "checkpoint/state.pt"
        self.fingerprint = fingerprint(examples, models)
        self.signal = 0
        self.handlers = [
            (number, signal.signal(number, self.interrupt))
            for number in (signal.SIGINT, signal.SIGTERM)
        ]
        self.bar = tqdm(total=steps, disable=rank() > 0 or None)

    def restore(self):
        """Start the run, or with --resume continue after its checkpoint. Returns the steps done."""
        broadcast_from_rank0(self.make_dir)
        state = {"step": 0, "log_sizes": {}}
        if self.checkpoint.exists():
            state = torch.load(self.checkpoint, weights_only=True)
            if state["fingerprint"] != self.fingerprint:
                fail("--resume: data or initial weights differ from the run's")
            set_state_dict(
                self.models,
                self.optimizer,
                model_state_dict=state["models"],
                optim_state_dict=state["optimizer"],
                options=FULL_STATE_DICT,
            )
        self.log_sizes = state["log_sizes"]  # name -> bytes
        if rank() == 0:
            for name, size in self.log_sizes.items():  # drop what was logged later
                os.truncate(self.dir / name, size)
            new = self.dir / "args.json.new"
            new.write_text(json.dumps(vars(self.args), indent=1))
            new.replace(self.dir / "args.json")
        self.bar.update(state["step"])
        return state["step"]

    def make_dir(self):
        """Create the directory, moving an earlier run aside."""
        can_resume = self.args.resume and self.checkpoint.exists()
        if (self.dir / "args.json").exists() and not can_resume:
            old = f"{self.dir}.{datetime.now():%Y%m%d-%H%M%S-%f}"
            self.dir.rename(old)
            print(f"moved the earlier run to {old}")
        self.checkpoint.parent.mkdir(parents=True, exist_ok=True)

    def checkpoint_if_due(self, step, force=False):
        """Save every --save-every steps, after the last step, and before a signal ends the run."""
        signal_number = all_reduce(self.signal, op="max")
        if force or signal_number or is_due(self.args.save_every, step, self.steps):
            models, optimizer = get_state_dict(
                self.models,
                self.optimizer,
                options=FULL_STATE_DICT,
            )
            state = {
                "step": step,
                "models": models,
                "optimizer": optimizer,
                "log_sizes": self.log_sizes,
                "fingerprint": self.fingerprint,
            }
            if rank() == 0:  # a kill leaves the old checkpoint or the new one
                torch.save(state, f"{self.checkpoint}.new")
                os.replace(f"{self.checkpoint}.new", self.checkpoint)
        if signal_number and step < self.steps:
            print(f"stopped after step {step}; --resume continues")
            raise SystemExit(128 + signal_number)

    def interrupt(self, number, frame):
        """Finish the step, save and exit. Signals may come twice: torchrun sends Ctrl-C again."""
        self.signal = number

    def append(self, name, row):
        """Append a row to a JSONL log; NaN and infinity become null."""
        row = json.loads(json.dumps(row, default=str), parse_constant=lambda constant: None)
        if rank() == 0:
            # overwrite a log that the checkpoint does not have
            with open(self.dir / name, "a" if name in self.log_sizes else "w") as file:
                file.write(json.dumps(row) + "\n")
                self.log_sizes[name] = file.tell()

    def log(self, step, metrics, show=()):
        """Append metrics to metrics.jsonl; print evaluations and the metrics named in show."""
        metrics = {name: float(value) for name, value in metrics.items()}
        self.append("metrics.jsonl", {"step": step} | metrics)
        evaluation = [name for name in metrics if name.startswith("eval/")][:8]
        self.bar.update(step - self.bar.n)
        self.bar.set_postfix({k: metrics[k] for k in evaluation or show if k in metrics})
        if evaluation or self.bar.disable and is_due(self.args.log_every, step, self.steps):
            tqdm.write(f"step {step}/{self.steps}: {self.bar.postfix}")

    def log_samples(self, step, rollouts, values):
        """Append rollouts and values (name -> list) to samples.jsonl; print the first three."""
        for i, rollout in enumerate(rollouts):
            prompt = rollout["prompt"]
            text = completion_text(self.tokenizer, rollout)
            row = {"step": step, "prompt": prompt, "completion": text}
            self.append("samples.jsonl", row | {name: x[i] for name, x in values.items()})
            if i < 3:
                tqdm.write(f"  {str(prompt)[-60:]!r} -> {text!r:.60}")

    def finish(self, model):
        """Save model and tokenizer in transformers format."""
        weights = get_model_state_dict(model, options=FULL_STATE_DICT)
        if rank() == 0:
            model.save_pretrained(self.dir, state_dict=weights)
            self.tokenizer.save_pretrained(self.dir)
        for number, handler in self.handlers:
            signal.signal(number, handler)
        self.bar.close()
        print(f"saved the model to {self.dir}")
