"""What the methods of RLHF share: models, data, sampling, rewards, runs on disk. No method is here:
log-probs, advantages, losses, evaluation and update loops stand in the scripts. Here, in order:

    1. command line   2. processes   3. models    4. the built-in task   5. data
    6. batches        7. sampling    8. rewards   9. runs
"""

import atexit
import contextlib
import copy
import functools
import hashlib
import importlib.util
import inspect
import json
import math
import numbers
import os
import random
import re
import runpy
import shutil
import signal
import sys
import time
import zlib
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import torch
import transformers
import tyro
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from torch import distributed, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)
from transformers.modeling_layers import GradientCheckpointingLayer

transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()


# ---------------------------------------------------------------- 1. command line
def fail(message):
    """End the program with one sentence on stderr and exit status 2."""
    if rank() > 0:
        time.sleep(5)  # the first process says the same, and torchrun then ends this one
    print(f"error: {message}", file=sys.stderr, flush=True)
    raise SystemExit(2)


def cli(Args, laptop):
    """Command line -> Args.

    Without --model it is the laptop run, whose flags `laptop` gives. With --resume the flags saved
    in --output-dir are the defaults. Flags on the command line win."""
    # in a terminal that is too narrow --help would be a letter a line
    os.environ["COLUMNS"] = str(max(80, shutil.get_terminal_size().columns))
    if "--help" in sys.argv and hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `--help | head` ends without a word
    is_laptop = not any(word.partition("=")[0] == "--model" for word in sys.argv[1:])
    description = (
        f"{sys.modules[Args.__module__].__doc__}\n\n"
        "Defaults are those of the laptop run; `--model X --help` shows those for real models."
    )
    args = tyro.cli(Args, default=Args(**laptop) if is_laptop else Args(), description=description)
    if args.resume:
        args = tyro.cli(Args, default=Args(**saved_flags(args)))
    if is_laptop and not args.resume and {args.dataset, args.eval_dataset} - {TASK, None}:
        fail("a --dataset of your own needs --model: the laptop run's model knows only `sort`")
    return args


def saved_flags(args):
    """The flags of the run in --output-dir."""
    path = Path(args.output_dir, "args.json").expanduser()
    if not path.is_file():
        fail(f"--resume: {args.output_dir} holds no run; start it without --resume")
    saved = json.loads(path.read_text())
    if saved.keys() != vars(args).keys():
        fail(f"--resume: {args.output_dir} holds a run of another script, or of an older one")
    return saved


def setup(args):
    """Check --output-dir, choose device and dtype -> device, autocast (a context)."""
    if hasattr(sys.stdout, "reconfigure"):  # not every terminal has every character
        sys.stdout.reconfigure(errors="backslashreplace")
    device = start_processes()
    for name, value in vars(args).items():
        if value == "":
            fail(f"--{name.replace('_', '-')} is empty: is a variable of the shell not set?")
        if isinstance(value, str):
            setattr(args, name, os.path.expanduser(value))
    on_first_rank(lambda: check_output_dir(args))

    is_cuda = device.type == "cuda"
    if args.micro_batch_tokens is None:
        args.micro_batch_tokens = 16_384 if is_cuda else 4096
    dtype = args.dtype
    if dtype == "auto":  # emulated, as on older cards, bfloat16 is slower than float32
        has_bfloat16 = is_cuda and torch.cuda.is_bf16_supported(including_emulation=False)
        dtype = "bfloat16" if has_bfloat16 else "float32"
    print(f"device: {world_size()} x {device.type}; weights float32, compute {dtype}")

    autocast = functools.partial(
        torch.autocast,
        device.type,
        dtype=torch.bfloat16,
        enabled=dtype == "bfloat16",
    )
    return device, autocast


def check_output_dir(args):
    """Stop if --output-dir holds what this run would take away: another run, or other files."""
    folder = Path(args.output_dir)
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        names = []
    except OSError as error:
        fail(f"--output-dir {folder}: {error.strerror}")
    if LOCK in names:
        lock(folder).release()
    if args.resume:
        saved_flags(args)
    elif set(names) <= BEGUN:
        return
    elif "args.json" in names:
        if not args.overwrite:
            fail(f"{folder} holds a run: --resume goes on, --overwrite sets it aside")
        for name, value in vars(args).items():
            for path in str(value).split(","):
                path = Path(path.partition(".py:")[0]).expanduser().resolve()
                if folder.resolve() in [path, *path.parents] and name != "output_dir":
                    flag = f"--{name.replace('_', '-')}"
                    fail(f"{flag} {value} lies in --output-dir, which --overwrite would move")
    else:
        fail(f"--output-dir {folder}: holds files, and they are no run; name a new folder")


LOCK = ".lock"
# what a run has that came to no step: the next may take its folder
BEGUN = {LOCK, "args.json", "args.json.new", "digest", "digest.new"}


def lock(folder):
    """Keep other runs out of a folder until this one ends."""
    file = FileLock(folder / LOCK, is_singleton=True)
    try:
        file.acquire(blocking=False)
    except Timeout:
        fail(f"--output-dir {folder}: another run is going on in it")
    return file


def generator(seed, *purpose):
    """A torch.Generator that its arguments determine, so that --resume has no state to restore."""
    digest = hashlib.sha256(repr((seed, *purpose)).encode()).hexdigest()
    return torch.Generator().manual_seed(int(digest[:15], 16))


# ---------------------------------------------------------------- 2. processes
# With one process nothing of this runs. Under torchrun each model is split over all processes
# (FSDP2), each takes its share of every batch, and sums run over all of them: the same numbers as
# with one.
def rank():
    """The number of this process among those that torchrun started; 0 with one."""
    return int(os.environ["RANK"]) if distributed.is_torchelastic_launched() else 0


def world_size():
    """The number of processes."""
    return int(os.environ["WORLD_SIZE"]) if distributed.is_torchelastic_launched() else 1


def start_processes():
    """Join the processes that torchrun started -> this one's device. Only the first prints."""
    is_cuda = torch.cuda.is_available()
    device = torch.device("cuda" if is_cuda else "cpu")
    if world_size() == 1:
        return device
    if is_cuda:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    if not distributed.is_initialized():
        # (NCCL alone could not add up numbers that are on the CPU)
        distributed.init_process_group("cpu:gloo,cuda:nccl" if is_cuda else "gloo")
        if rank() > 0:
            sys.stdout = open(os.devnull, "w")
    return device


def all_reduce(value, op="sum"):
    """The sum ("max": the largest) of a number or tensor over all processes, the same in each."""
    if world_size() == 1:
        return value
    total = torch.as_tensor(value).clone()
    distributed.all_reduce(total, getattr(distributed.ReduceOp, op.upper()))
    return total if isinstance(value, torch.Tensor) else total.item()


def on_first_rank(function):
    """What function() returns in the first process, in all of them; the others do not call it, and
    wait."""
    result = [function() if rank() == 0 else None]
    if world_size() > 1:
        distributed.broadcast_object_list(result)
    return result[0]


def shard(model, device):
    """The model on its device; with several processes its parameters, gradients and optimiser state
    split over them, layer by layer (FSDP2)."""
    if world_size() == 1:
        return model.to(device)
    mesh = distributed.init_device_mesh(device.type, (world_size(),))
    layers = [m for m in model.modules() if type(m).__name__ in set(model._no_split_modules or ())]
    for module in [*layers, model]:
        fully_shard(module, mesh=mesh, reshard_after_forward=True)
        # a sum, not a mean, over processes: a loss's weights carry the count of the whole batch
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    model.run = lambda function, *args, **kwargs: function(model, *args, **kwargs)
    register_fsdp_forward_method(model, "run")
    return model


def as_forward(function):
    """Decorates function(model, ...) that calls parts of a model: FSDP gathers their weights."""

    @functools.wraps(function)
    def run(model, *args, **kwargs):
        if isinstance(model, FSDPModule):
            return model.run(function, *args, **kwargs)
        return function(model, *args, **kwargs)

    return run


@contextlib.contextmanager
def unsharded(model):
    """The whole model in each process while it samples: none waits for another at each token."""
    shards = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for module in shards:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    yield
    for module in shards:
        module.set_reshard_after_forward(True, recurse=False)
        module.reshard()


def clip_gradients(model, max_norm):
    """Scale the gradient down to a norm of max_norm (0: never) -> its norm before, a tensor."""
    norm = nn.utils.clip_grad_norm_(model.parameters(), max_norm or math.inf)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


# ---------------------------------------------------------------- 3. models
def from_pretrained(cls, path, flag, **options):
    """cls.from_pretrained(path), a failure as one sentence that names the flag."""
    if path.startswith("runs/") and not Path(path).exists():
        script = Path(__file__).with_name(f"{path.removeprefix('runs/')}.py")
        advice = f": run `python {script.name}` first" if script.exists() else ""
        fail(f"{flag} {path} is not there{advice}")
    if Path(path, "adapter_config.json").exists():
        fail(f"{flag} {path} is an adapter (LoRA): merge it into its model first")
    try:
        return cls.from_pretrained(path, **options)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().partition("\n")[0]
        fail(f"{flag} {path}: no directory or Hub id that can be loaded ({reason})")


def load_weights(cls, path, flag, config, has_new_head=False):
    """A model with float32 weights: those of the checkpoint, all of them and no others, but for the
    new head of a language model that is to be a scorer."""
    if getattr(config, "quantization_config", None) is not None:
        fail(f"{flag} {path} is quantised, and weights here are float32: name the model it is of")
    model, info = from_pretrained(
        cls,
        path,
        flag,
        config=config,
        dtype=torch.float32,
        use_safetensors=True,  # nothing is unpickled
        output_loading_info=True,
    )
    names = {*info["missing_keys"], *info["unexpected_keys"]}
    names = {name for name in names if not name.endswith(".masked_bias")}  # GPT-2's old constants
    if has_new_head:
        names = {name for name in names if name.startswith(f"{model.base_model_prefix}.")}
    if names:
        wrong = ", ".join(sorted(names)[:3])
        fail(f"{flag} {path}: {type(model).__name__} and its file do not both have {wrong} ...")
    return model


def load_tokenizer(path, flag="--model", template_kwargs=None):
    """The tokenizer of a directory or Hub id. Without a PAD of its own it pads with EOS.

    template_kwargs, JSON, become the first lines of its chat template, so that whoever opens what
    is saved has them too."""
    tokenizer = from_pretrained(AutoTokenizer, path, flag)
    if tokenizer.eos_token_id is None and flag == "--model":
        fail(f"{flag} {path}: its tokenizer has no EOS token, so nothing could end; set one")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if template_kwargs is not None:
        if tokenizer.chat_template is None:
            fail(f"--chat-template-kwargs: the tokenizer of {path} has no chat template")
        tokenizer.chat_template = with_variables(tokenizer.chat_template, template_kwargs)
    return tokenizer


def with_variables(template, template_kwargs):
    """A chat template in which the variables of a JSON object have these values, unless whoever
    renders it gives others."""
    try:
        variables = json.loads(template_kwargs).items()
    except (ValueError, AttributeError) as error:
        fail(f"--chat-template-kwargs {template_kwargs!r}: wanted a JSON object ({error})")
    for name, value in variables:
        if not re.search(rf"\b{re.escape(name)}\b", template):
            fail(f"--chat-template-kwargs: the chat template has no variable {name}")
        value = "none" if value is None else json.dumps(value)
        template = f"{{% set {name} = {name} if {name} is defined else {value} %}}{template}"
    return template


@functools.cache
def end_of_turn_id(tokenizer):
    """The id that ends a completion: what the chat template puts after a turn, else EOS."""
    if tokenizer.chat_template is None:
        return tokenizer.eos_token_id
    messages = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "good-bye"}]
    after = render(tokenizer, messages).rpartition("good-bye")[2]
    special_ids = [i for i, token in tokenizer.added_tokens_decoder.items() if token.special]
    ids = tokenizer(after, add_special_tokens=False).input_ids
    return next((i for i in ids if i in special_ids), tokenizer.eos_token_id)


def find_eos_ids(tokenizer, path):
    """All ids that end a completion, sorted: of tokenizer, chat template and generation config."""
    try:
        configured = transformers.GenerationConfig.from_pretrained(path).eos_token_id
    except OSError:  # a model without one
        configured = None
    eos_ids = {tokenizer.eos_token_id, end_of_turn_id(tokenizer)}
    eos_ids |= set(configured if isinstance(configured, list) else [configured])
    return sorted(eos_ids - {None})


def context_of(config):
    """Positions that a model was made for; infinite where its config does not say."""
    return getattr(config.get_text_config(), "max_position_embeddings", None) or math.inf


def check_fit(path, flag, *, examples, tokens, lengths):
    """Stop if sequences of that many tokens, which the flags `lengths` limit, or ids of the
    examples, are beyond what a model was made for."""
    config = from_pretrained(AutoConfig, path, flag)
    context = context_of(config)
    if tokens > context:
        fail(f"{tokens} tokens do not fit the context of {flag} {path}, {context}: lower {lengths}")
    largest = max(max(ids) for x in examples for name, ids in x.items() if name.endswith("ids"))
    if largest >= config.get_text_config().vocab_size:
        fail(f"{flag} {path} has no embedding of token {largest}, its tokenizer has: resize it")


def load_policy(path, device, flag="--model", *, trainable=False, gradient_checkpointing=False):
    """A causal language model with float32 weights, on its device."""
    config = from_pretrained(AutoConfig, path, flag)
    model = load_weights(AutoModelForCausalLM, path, flag, config)
    check_policy(model, flag)
    return prepare(
        model,
        device,
        trainable=trainable,
        gradient_checkpointing=gradient_checkpointing,
    )


def load_scorer(
    path,
    device,
    flag,
    *,
    trainable=False,
    gradient_checkpointing=False,
    init=None,
):
    """A sequence-classification model with one output, float32 weights, on its device.

    init(model, has_new_head) is called before it is split over processes; without it a language
    model, whose head is new, is an error."""
    config = from_pretrained(AutoConfig, path, flag)
    is_scorer = "SequenceClassification" in str(config.architectures)
    if not is_scorer and init is None:
        fail(f"{flag} {path}: {config.architectures} is no reward model: run reward_model.py on it")
    config.num_labels = 1
    model = load_weights(
        AutoModelForSequenceClassification,
        path,
        flag,
        config,
        has_new_head=not is_scorer,
    )
    if trainable and not has_score_head(model):
        fail(f"{flag} {path}: {type(model).__name__} has no plain `score` head: use a decoder")
    if init is not None:
        with torch.no_grad():
            init(model, not is_scorer)
    return prepare(
        model,
        device,
        trainable=trainable,
        gradient_checkpointing=gradient_checkpointing,
    )


def has_score_head(model):
    """True for a head that is one product with the last hidden state."""
    head = getattr(model, "score", None)
    return isinstance(head, nn.Linear) and head.bias is None


def prepare(model, device, trainable, gradient_checkpointing=False):
    """Gradients on or off; split over processes if there are several."""
    # dropout and jitter stay off: else two forwards differ, and the first update's ratio is not 1
    model.eval()
    model.requires_grad_(trainable)
    # by torch's own: transformers' asks for train mode, dropout and all
    for module in model.modules() if gradient_checkpointing else []:
        if isinstance(module, GradientCheckpointingLayer):
            module.forward = functools.partial(checkpoint, module.forward, use_reentrant=False)
    return shard(model, device)


def head_logits(model, hidden):
    """(N, H) last hidden states -> (N, V) float32 logits, scaled and capped as by the model."""
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


@torch.no_grad()
def check_policy(model, flag):
    """Stop unless training (right padding, head_logits) and sampling (left padding, a cache whose
    rows are moved and dropped) have the logits of the model's own forward without any."""
    if model.config.get_text_config().vocab_size < 28:
        return  # (a toy)
    rows = torch.arange(1, 28).view(3, 9)  # no token twice: its number says where it stands
    prompts = [ids[:n] for ids, n in zip(rows.tolist(), (6, 1, 4))]
    completions = torch.tensor([[7, 8, 9], [11, 12, 13], [23, 24, 25]])
    mask = torch.ones_like(rows).tril(5)  # of 6, 7 and 8 tokens
    check = functools.partial(
        torch.testing.assert_close,
        rtol=1e-3,
        atol=1e-3,
        msg="padding, cache or head change logits",
    )

    def choose(logits, noise):
        """The noise is the token to take: number v stands at place v - 1 of `rows`, so that the
        logits of v - 2 speak of it."""
        check(logits, own.flatten(0, 1)[noise - 2])
        return noise

    try:
        own = model(input_ids=rows, use_cache=False).logits
        # (7: the first row ends at once, and its cache is dropped)
        sample_rows(model, prompts, completions, choose, eos_ids=torch.tensor([7]))
        outputs = model.base_model(input_ids=rows * mask, attention_mask=mask, use_cache=False)
        check(head_logits(model, outputs.last_hidden_state)[mask > 0], own[mask > 0])
    except (AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as e:
        name = type(model).__name__
        fail(f"{flag}: {name} cannot be sampled from and trained here ({str(e)!r:.200})")


# ---------------------------------------------------------------- 4. the built-in task
TASK = "sort"
LETTERS = "abcdefghijklmnopqrstuvwxyz"
# demonstrations are scarce
TASK_ROWS = {"sft": 165, "pairs": 40_000, "prompt": 20_000, "held out": 500}


def task_rows(kind, held_out, seed):
    """Rows of the built-in task, 4 to 7 different letters: prompt `dbca>`, answer `abcd`.

    Whether letters are held out depends on them alone; held-out rows are the same for all seeds."""
    kind = {"sft": "sft", "ptx": "sft", "prompt": "prompt"}.get(kind, "pairs")
    rng = random.Random(f"{'held out' if held_out else seed}/{kind == 'pairs'}")
    rows = []
    while len(rows) < TASK_ROWS["held out" if held_out else kind]:
        letters = "".join(rng.sample(LETTERS, rng.randint(4, 7)))
        if (zlib.crc32(letters.encode()) % 8 == 0) != held_out:
            continue
        answer = "".join(sorted(letters))
        row = {"prompt": f"{letters}>", "answer": answer}
        if kind == "pairs":
            row["chosen"] = answer
            row["rejected"] = wrong_answer(answer, rng)
        rows.append(row)
    return rows


def wrong_answer(answer, rng):
    """A letter replaced, put in or left out; like most mistakes of a half-trained model, most
    answers are in order all the same."""
    wrong = answer
    while wrong == answer:
        i = rng.randrange(len(answer))
        letter = rng.choice(LETTERS)
        instead = rng.choice([letter, letter + answer[i], ""])
        wrong = answer[:i] + instead + answer[i + 1 :]
        if rng.random() < 0.6:
            wrong = "".join(sorted(wrong))
    return wrong


def task_checker(prompts, completions, rows):
    """1.0 for exactly the letters in order and then EOS, else 0.0."""
    return [
        float(row["finished"] and text.strip() == row["answer"])
        for text, row in zip(completions, rows)
    ]


# ---------------------------------------------------------------- 5. data
PROMPT_COLUMNS = ["prompt", "instruction", "question"]
COMPLETION_COLUMNS = ["completion", "output", "answer"]
READ_COLUMNS = {*PROMPT_COLUMNS, *COMPLETION_COLUMNS, "messages", "chosen", "rejected", "margin"}
COMPARED_COLUMNS = {"completions", "scores", "labels", "finished", "row"}


class BadRow(Exception):
    """What is wrong with a row, for which a run stops."""


class DroppedRow(Exception):
    """Why a row is left out and counted: it is well-formed, and cannot be used whole."""


def load_examples(dataset, make_example, tokenizer, args, held_out=False):
    """Read, check and tokenise a data set -> list of examples: what make_example (sft_example,
    preference_example, comparison_example or prompt_example) gives, with `row` as in the file and
    `where` it stands.

    A row that cannot be used whole is dropped and counted, never cut."""
    kind = make_example.__name__.removesuffix("_example")
    end_id = end_of_turn_id(tokenizer)
    if dataset.endswith((".jsonl", ".json")):
        rows = read_file(dataset)
    else:
        is_task = dataset == TASK
        rows = task_rows(kind, held_out, args.seed) if is_task else read_table(dataset)
        rows = [(f"{dataset} row {number}", row) for number, row in enumerate(rows, 1)]

    examples = []
    dropped = {}  # reason -> where
    columns = Counter()
    for where, row in rows:
        try:
            if not isinstance(row, dict):
                raise BadRow(f"is a {type(row).__name__}, not an object")
            example = make_example(row, tokenizer, end_id, args)
            examples.append({"row": row, "where": where} | example)
        except BadRow as error:
            fail(f"{where}: {error}")
        except DroppedRow as error:
            dropped.setdefault(str(error), []).append(where)
        columns.update(row.keys())

    report = f"{dataset}{' (held out)' if held_out else ''}: {len(examples)} rows"
    for reason, places in dropped.items():
        report += f"; {len(places)} dropped {reason}, the first at {places[0]}"
    if not examples:
        fail(f"{report}: nothing is left")
    print(report)
    if dataset != TASK:
        print_columns(dataset, columns, len(rows), kind, args)
    if tokenizer.chat_template is not None and isinstance(examples[0]["prompt"], str):
        print(f"{dataset}: texts, which no chat template touches (lists of messages go through it)")
    return examples


def print_columns(dataset, columns, num_rows, kind, args):
    """Columns (name -> rows that have it) that no script reads, and those that some rows lack."""
    read = READ_COLUMNS | (COMPARED_COLUMNS if kind == "comparison" else set())
    unread = [name for name in columns.keys() - read if "{" + name not in args.prompt_template]
    if unread:
        use = "for a reward function alone" if kind == "prompt" else "that are not used"
        print(f"{dataset}: columns {use}: {', '.join(sorted(unread))}")
    for name, count in columns.items():
        if count < num_rows:
            print(f"{dataset}: column {name} is in {count} of {num_rows} rows")


def load_held_out(make_example, tokenizer, args):
    """Examples of --eval-dataset, or the built-in task's own held-out rows; else none, and a line
    says so."""
    dataset = args.eval_dataset or (TASK if args.dataset == TASK else None)
    if dataset is None:
        print("no --eval-dataset: nothing is held out")
        return []
    return load_examples(dataset, make_example, tokenizer, args, held_out=True)


def read_file(path):
    """(where it stands, row) of each row of a .jsonl file, but for empty lines, or of a .json file
    that holds one list."""
    where = path
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        if path.endswith(".json"):
            return [(f"{path} row {n}", row) for n, row in enumerate(json.loads(text), 1)]
        rows = []
        for number, line in enumerate(text.split("\n"), 1):
            where = f"{path} line {number}"
            if line.strip():
                rows.append((where, json.loads(line)))
        return rows
    except FileNotFoundError:
        fail(f"{path}: there is no such file")
    except (OSError, ValueError, TypeError, RecursionError) as error:
        fail(f"{where}: cannot be read ({error}); wanted a JSON object a line, in .json a list")


TABLES = {".csv": "csv", ".parquet": "parquet", ".gz": "json"}


def read_table(dataset):
    """Rows of a .csv, .parquet or .jsonl.gz file, or of a Hub data set: name, name:split or
    name:configuration:split."""
    if importlib.util.find_spec("datasets") is None:
        fail(f"{dataset} is no .jsonl or .json file: to read others, run `pip install datasets`")
    import datasets

    kind = TABLES.get(Path(dataset).suffix)
    name, *configuration = dataset.split(":")
    split = configuration.pop() if configuration else "train"
    try:
        if kind is not None:
            return list(datasets.load_dataset(kind, data_files=dataset, split="train"))
        return list(datasets.load_dataset(name, *configuration, split=split))
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        fail(f"{dataset}: cannot be read ({' '.join(str(error).split())})")


def text_or_messages(row, names):
    """The first of these columns that the row has: a text, or a list of {"role", "content"}."""
    name = next((name for name in names if name in row), None)
    if name is None:
        raise BadRow(f"no column {' or '.join(names)} among {', '.join(row)}")
    value = row[name]
    if isinstance(value, str):
        return value
    messages = [plain_message(message) for message in value] if isinstance(value, list) else []
    if not messages or None in messages:
        raise BadRow(f"`{name}` is no text and no list of messages (role, content): {value!r:.80}")
    return messages


def plain_message(message):
    """A message with a text as its content, also where it came in parts; None if it is none."""
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        return None
    if message.get("tool_calls"):  # most templates leave them out, and nothing is left to train
        raise DroppedRow("with calls of tools")
    content = message.get("content")
    if isinstance(content, list):
        parts = [part.get("text") if isinstance(part, dict) else None for part in content]
        if None in parts:
            raise DroppedRow("with content that is not text")
        content = "".join(parts)
    return message | {"content": content} if isinstance(content, str) else None


def prompt_of(row, args):
    """The prompt of a row: a column as it is, or several through --prompt-template."""
    if args.prompt_template == "{prompt}":
        return text_or_messages(row, PROMPT_COLUMNS)
    if isinstance(row.get("prompt"), list):
        raise BadRow("--prompt-template is for texts, and `prompt` is a list of messages")
    try:
        # (in a shell's '...' a line break is written as these two characters)
        return args.prompt_template.replace("\\n", "\n").format(**row)
    except (LookupError, ValueError, AttributeError, TypeError) as error:
        template = f"--prompt-template {args.prompt_template!r}"
        raise BadRow(f"{template} does not fit the columns {', '.join(row)} ({error!r})") from error


def render(tokenizer, messages, **options):
    """Messages -> text by the tokenizer's chat template."""
    if tokenizer.chat_template is None:
        raise BadRow("messages need a chat template, and the tokenizer has none")
    try:
        return tokenizer.apply_chat_template(
            messages,
            tokenize=False,
            **options,
        )
    except Exception as error:  # jinja2's errors, and whatever a template raises
        reason = " ".join(str(error).split())
        raise BadRow(f"the chat template refuses these messages ({reason})") from error


def encode(tokenizer, texts, is_chat):
    """The ids of each text. A chat template writes BOS itself; to a plain text the tokenizer adds
    it, once."""
    try:
        encoded = tokenizer(texts, add_special_tokens=not is_chat, verbose=False).input_ids
    except TypeError as error:
        raise BadRow("half of a surrogate pair (\\ud800 to \\udfff) is no text") from error
    for text, ids in zip(texts, encoded):
        if ids[-1:] == [tokenizer.eos_token_id] and not text.endswith(tokenizer.eos_token):
            ids.pop()  # (some tokenizers add EOS, to prompts too)
    return encoded


def encode_completions(tokenizer, prompt, completions, end_id):
    """A prompt and completions of it, texts or messages -> prompt_ids, and of each completion its
    ids with one EOS.

    Prompt and completion are tokenised as one text and split where the prompt's tokens end, so that
    the boundary is the one that the model sees when it samples."""
    is_chat = isinstance(prompt, list)
    if is_chat:
        conversations = [join_messages(prompt, completion) for completion in completions]
        check_answer_roles(prompt, conversations)
        check_control_tokens(tokenizer, sum(conversations, prompt))
        texts = [render_prompt(tokenizer, prompt, completions)]
        texts += [render(tokenizer, messages) for messages in conversations]
    elif all(isinstance(completion, str) for completion in completions):
        texts = [prompt] + [prompt + completion for completion in completions]
    else:
        raise BadRow("the prompt is a text, so the answer must be a text too, not messages")
    prompt_ids, *sequences = encode(tokenizer, texts, is_chat)
    if not prompt_ids:
        raise DroppedRow("whose prompt is empty")
    if any(ids[: len(prompt_ids)] != prompt_ids for ids in sequences):
        cause = (
            " (the chat template writes an answer's turn in another way, as those do that open or "
            "strip a think block: look for a variable for --chat-template-kwargs)"
        )
        cause = cause if is_chat else ""
        raise DroppedRow(f"whose prompt is, in tokens, no prefix of prompt and completion{cause}")
    completions = [ids[len(prompt_ids) :] for ids in sequences]
    return prompt_ids, [end_once(tokenizer, ids, end_id, is_chat) for ids in completions]


def check_answer_roles(prompt, conversations):
    """Drop a row whose answer goes on with a turn that the assistant did not write."""
    for messages in conversations:
        if any(message["role"] != "assistant" for message in messages[len(prompt) :]):
            raise DroppedRow("whose answer holds turns of others than the assistant")


def render_prompt(tokenizer, prompt, completions):
    """Messages up to where the assistant goes on: a new turn, or the one that the prompt begins."""
    is_begun = prompt[-1]["role"] == "assistant" and all(isinstance(c, str) for c in completions)
    options = {"continue_final_message" if is_begun else "add_generation_prompt": True}
    return render(tokenizer, prompt, **options)


def join_messages(prompt, completion):
    """Messages of a prompt and of a completion; a text ends the turn that the prompt begins."""
    if not isinstance(completion, str):
        return prompt + completion
    *before, last = prompt
    if last["role"] == "assistant":
        return [*before, last | {"content": last["content"] + completion}]
    return [*prompt, {"role": "assistant", "content": completion}]


def end_once(tokenizer, ids, end_id, is_chat):
    """A completion's ids with one EOS at their end, without what a chat template puts after it."""
    if is_chat and end_id in ids:
        return ids[: len(ids) - ids[::-1].index(end_id)]
    if end_id is None or ids[-1:] in ([end_id], [tokenizer.eos_token_id]):
        return ids
    return [*ids, end_id]


@functools.cache
def control_tokens(tokenizer):
    """Texts that a tokenizer reads as control: in a message they could end the turn."""
    added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    return (added | set(tokenizer.all_special_tokens)) - {""}


def check_control_tokens(tokenizer, messages):
    """Drop a row whose messages spell one. A text may: it can be a prompt rendered already."""
    text = " ".join(message["role"] + " " + message["content"] for message in messages)
    if any(token in text for token in control_tokens(tokenizer)):
        raise DroppedRow("whose messages spell a control token of the tokenizer")


def stream(examples, seed, start, stop):
    """Examples start to stop - 1 of an endless stream; each pass over the data is shuffled anew."""
    n = len(examples)
    first_epoch = start // n
    order = []
    for epoch in range(first_epoch, (stop - 1) // n + 1):
        order += torch.randperm(n, generator=generator(seed, "shuffle", epoch)).tolist()
    return [examples[i] for i in order[start - first_epoch * n : stop - first_epoch * n]]


# ---------------------------------------------------------------- 6. batches
# tokens below which a pass takes as long as a smaller one (CPU: measured; GPU: an estimate)
SMALL_BATCH = 4096 if torch.cuda.is_available() else 512


def pad_rows(rows, device, value=0, side="right"):
    """Lists of numbers -> (B, T), `value` where a row is shorter."""
    rows = [torch.tensor(row) for row in rows]
    return pad_sequence(rows, batch_first=True, padding_value=value, padding_side=side).to(device)


def take(batch, rows):
    """Some rows of every tensor of a batch, those of (B, T) cut to the longest of these rows.

    Of no rows it makes two that count for nothing, all 0: where there are several processes, each
    must go through the model as often as the others."""
    if len(rows) == 0:
        batch = {name: torch.zeros_like(x) for name, x in batch.items()}
        batch["attention_mask"][:, 0] = 1
        rows = [0, 0]
    width = batch["attention_mask"][rows].sum(1).max()
    return {name: x[rows, :width] if x.ndim == 2 else x[rows] for name, x in batch.items()}


def micro_batch_rows(batch, budget):
    """Row numbers of the micro-batches of this process: lists; the last ones may be empty."""
    lengths = batch["attention_mask"].sum(1).tolist()
    group_of_row = batch["group"].tolist() if "group" in batch else range(len(lengths))
    groups = {}
    for row, group in enumerate(group_of_row):
        groups.setdefault(group, []).append(row)
    groups = [(max(lengths[row] for row in rows), rows) for rows in groups.values()]
    groups.sort(key=lambda group: -group[0])
    lists = []
    longest = 0
    for length, rows in groups[rank() :: world_size()]:
        tokens = longest * (len(lists[-1]) + len(rows)) if lists else math.inf
        is_uneven = length < 0.9 * longest and tokens > SMALL_BATCH
        if tokens > budget or is_uneven:
            lists.append([])
            longest = length
        lists[-1] += rows
    return lists + [[]] * (all_reduce(len(lists), op="max") - len(lists))


def micro_batches(batch, budget):
    """Cut a batch into what goes through a model at once: with padding at most `budget` tokens, or
    one row or group.

    Rows of one "group" (the two of a pair, the completions of a prompt), where a batch has that
    column, stay together and in order. Rows of about one length stand together, none shorter than
    nine tenths of the longest unless the micro-batch is small. Each of W processes takes every W-th
    row or group, and as many micro-batches as any other."""
    for rows in micro_batch_rows(batch, budget):
        yield take(batch, rows)


@torch.no_grad()
def in_micro_batches(function, batch, budget):
    """function(micro-batch) -> (b, t) or (b,); of a whole batch -> (B, T) or (B,)."""
    result = None
    for rows in micro_batch_rows(batch, budget):
        values = function(take(batch, rows))
        if result is None:
            result = values.new_zeros(batch["inputs"].shape[: values.ndim])
        cells = (rows, slice(values.shape[1])) if values.ndim == 2 else rows
        result[cells] = values[: len(rows)]
    return all_reduce(result)


# ---------------------------------------------------------------- 7. sampling
# of prompts and completions sampled together: a GPU takes as long for many rows as for few
TOKENS_AT_A_TIME = 262_144 if torch.cuda.is_available() else 65_536


@torch.no_grad()
def sample(
    model,
    prompts,
    *,
    num_generations=1,
    max_new_tokens,
    temperature=1.0,
    eos_ids,
    rng,
    token_budget=TOKENS_AT_A_TIME,
):
    """Sample from all of softmax(logits / temperature): no top-k, no top-p, no generation config.

    prompts: P lists of ids -> P * num_generations completions, lists of ids, a prompt's side by
    side. A completion ends with its EOS, or after max_new_tokens. temperature 0: greedy. Ids that a
    model has and its tokenizer lacks can be drawn too, and PAD. Noise belongs to row and step (one
    uniform number each), so that neither dropping finished rows nor token_budget, the tokens that
    are sampled at a time, changes a token. Each of W processes samples for every W-th prompt."""
    if temperature < 0:
        raise ValueError(f"the temperature is {temperature}, and it cannot be negative")
    noise = torch.rand(
        len(prompts),
        num_generations,
        max_new_tokens,
        generator=rng,
        dtype=torch.float64,
    )
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    order = order[rank() :: world_size()]
    row_tokens = max(map(len, prompts)) + max_new_tokens
    prompts_at_a_time = max(1, token_budget // (num_generations * row_tokens))
    tokens = torch.zeros(noise.shape, dtype=torch.long, device=model.device)
    with unsharded(model):
        for start in range(0, len(order), prompts_at_a_time):
            indices = order[start : start + prompts_at_a_time]
            rows = sample_rows(
                model,
                [prompts[i] for i in indices],
                noise[indices].flatten(0, 1).to(model.device),
                functools.partial(draw, temperature=temperature),
                torch.tensor(eos_ids, device=model.device),
            )
            tokens[indices] = rows.view(len(indices), num_generations, max_new_tokens)
    tokens = all_reduce(tokens).flatten(0, 1).tolist()
    return [cut_at_eos(ids, eos_ids) for ids in tokens]


def sample_rows(model, prompts, noise, choose, eos_ids):
    """P prompts, noise (B, max_new_tokens) -> tokens (B, max_new_tokens), anything after an EOS.

    choose: logits (b, V), noise (b,) -> tokens (b,). Each prompt, left-padded, goes through the
    model once; its generations start from copies of its keys, values and states. Rows that have
    ended leave the batch when they are a quarter of it: each time copies the cache."""
    device = noise.device
    B, max_new_tokens = noise.shape
    num_generations = B // len(prompts)
    inputs = pad_rows(prompts, device, side="left")
    attention_mask = pad_rows([[1] * len(ids) for ids in prompts], device, side="left")
    # left padding without positions of its own is wrong for learned ones (GPT-2)
    position_ids = (attention_mask.cumsum(1) - 1).clamp(min=0)
    cache = transformers.DynamicCache(config=model.config)
    tokens = torch.zeros(B, max_new_tokens, dtype=torch.long, device=device)
    row = torch.arange(B, device=device)  # which row of `tokens` each row of the cache belongs to
    is_finished = torch.zeros(B, dtype=torch.bool, device=device)
    for t in range(max_new_tokens):
        # each model's own way: Mamba, say, takes no mask after the prompt
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
            prompt = row // num_generations
            cache.reorder_cache(prompt)
            logits = logits[prompt]
            attention_mask = attention_mask[prompt]
            position_ids = position_ids[prompt, -1:]
        token = choose(logits.float(), noise=noise[row, t])
        tokens[row, t] = token
        is_finished = is_finished | torch.isin(token, eos_ids)
        num_finished = int(is_finished.sum())
        if num_finished == len(row):
            break
        attention_mask = F.pad(attention_mask, (0, 1), value=1)
        position_ids = position_ids + 1
        if num_finished >= len(row) / 4:
            unfinished = (~is_finished).nonzero()[:, 0]
            cache.reorder_cache(unfinished)
            attention_mask = attention_mask[unfinished]
            position_ids = position_ids[unfinished]
            token = token[unfinished]
            row = row[unfinished]
            is_finished = is_finished[unfinished]
        inputs = token[:, None]
    return tokens


def draw(logits, temperature, noise):
    """Logits (b, V), uniform noise (b,) -> tokens (b,), by the inverse of the cumulative sum."""
    if temperature == 0:
        return logits.argmax(-1)
    cdf = (logits / temperature).softmax(-1).cumsum(-1, dtype=torch.float64)
    # right=True: a token of probability 0 is never drawn
    token = torch.searchsorted(cdf, noise[:, None] * cdf[:, -1:], right=True)[:, 0]
    return token.clamp(max=logits.shape[-1] - 1)


def cut_at_eos(ids, eos_ids):
    """A completion up to its first EOS, which it keeps."""
    end = next((t for t, token_id in enumerate(ids) if token_id in eos_ids), len(ids) - 1)
    return ids[: end + 1]


def completion_text(tokenizer, prompt_ids, completion_ids):
    """decode(prompt + completion) less decode(prompt): alone it could lose a space."""
    decode = functools.partial(
        tokenizer.decode,
        skip_special_tokens=True,
        clean_up_tokenization_spaces=False,
    )
    prompt = decode(prompt_ids)
    whole = decode(prompt_ids + completion_ids)
    return whole[len(prompt) :] if whole.startswith(prompt) else decode(completion_ids)


# ---------------------------------------------------------------- 8. rewards
NUMBER = r"(?:[-−]\$?|\$[-−]?)?\d[\d,]*(?:\.\d+)?"


def gsm8k_number(text):
    """The answer that a worked solution ends in: the first number after the last `####` or in the
    last \\boxed{}, else the last number of all; None without one. Nothing is evaluated."""
    text = re.sub(r"\{,\}|\\,|\\!", "", text)  # LaTeX's thousands commas
    marked = re.findall(r"####([^\n]*)|\\boxed\{((?:[^{}]|\{[^{}]*\})*)\}", text)
    found = re.findall(NUMBER, "".join(marked[-1]))[:1] if marked else []
    found = found or re.findall(NUMBER, text)[-1:]
    return float(re.sub("[$,]", "", found[0]).replace("−", "-")) if found else None


def gsm8k_checker(prompts, completions, rows):
    """1.0 where a completion's number is that of column `answer`, else 0.0 (Cobbe et al. 2021)."""
    answers = [gsm8k_number(str(row["answer"])) for row in rows]
    return [float(a is not None and gsm8k_number(c) == a) for c, a in zip(completions, answers)]


CHECKERS = {TASK: task_checker, "gsm8k": gsm8k_checker}  # both read the column `answer`


def checker_reward(function, tokenizer, eos_ids):
    """A checker -> function (examples, completions) -> scores (B,) on the CPU, NaN where it cannot
    judge. Only the first process calls the checker."""

    def numbers_of(returned):
        if not isinstance(returned, Iterable):
            fail(f"the reward returned {returned!r}: wanted a list, a number for each completion")
        return list(returned)

    def score(examples, completions):
        # (copies: whatever the function does to them, the data stay as they are)
        prompts = [copy.deepcopy(example["prompt"]) for example in examples]
        texts = []
        rows = []
        for example, ids in zip(examples, completions):
            texts.append(completion_text(tokenizer, example["prompt_ids"], ids))
            rows.append(copy.deepcopy(example["row"]) | {"finished": ids[-1] in eos_ids})
        scores = on_first_rank(lambda: numbers_of(function(prompts, texts, rows)))
        scores = [x.tolist() if hasattr(x, "tolist") else x for x in scores]  # of arrays
        if len(scores) != len(texts):
            fail(f"the reward returned {len(scores)} numbers for {len(texts)} completions")
        for value in scores:
            is_number = isinstance(value, numbers.Real) and abs(value) < torch.finfo().max
            if not is_number and value is not None:
                fail(f"the reward returned {value!r}: wanted a float32, or None: it cannot judge")
        return torch.tensor([math.nan if value is None else float(value) for value in scores])

    return score


def same_ids(tokenizer, other):
    """True if every token has the same id in the other one (which may have more: its own PAD)."""
    return tokenizer.get_vocab().items() <= other.get_vocab().items()


@functools.cache
def token_text(tokenizer, token_id):
    """What one token spells; nothing for a control token."""
    return tokenizer.decode([token_id], skip_special_tokens=True)


def step_ends(tokenizer, ids, separator):
    """Where the steps of a completion end: at the tokens in which a separator ends, and at the last
    token, EOS. Steps of white space are none."""
    ends = []
    text = ""
    for t, token_id in enumerate(ids):
        text += token_text(tokenizer, token_id)
        if separator in text.lstrip():
            ends.append(t)
            text = text.rpartition(separator)[2]
    if ends and not text.strip():
        ends.pop()
    return [*ends, len(ids) - 1]


@as_forward
def scalar_head(model, batch):
    """The scalar head where the mask is 1, (b, t) -> (b, t), as in reward_model.py: transformers
    pools at the last id that is not PAD, which misreads a sampled PAD. Any other head is read by
    the model's own forward."""
    ids = {"input_ids": batch["inputs"], "attention_mask": batch["attention_mask"]}
    if not has_score_head(model):
        return model(**ids).logits[:, :1].float() * batch["mask"]
    mask = batch["mask"].bool()
    hidden = model.base_model(**ids, use_cache=False).last_hidden_state[mask]  # (N, H)
    scores = (hidden.float() * model.score.weight[0]).sum(-1)
    return scores.new_zeros(mask.shape).masked_scatter(mask, scores)


class RewardModel:
    """A reward model: examples and completions (lists of ids) -> scores (B,) float32 on the CPU.
    One with another tokenizer gets the text, or messages through its own chat template.

    The score is the head's at the last token. A process reward model (`reward_model.py --loss
    process`) gives the log-probability that the worst step is right (Wang et al. 2023,
    Math-Shepherd; Lightman et al. 2023 take the product: .sum(1) for .amin(1))."""

    def __init__(self, path, args, examples, policy_tokenizer, *, eos_ids, device, autocast):
        self.path = path
        self.args = args
        self.policy_tokenizer = policy_tokenizer
        self.eos_ids = eos_ids
        self.autocast = autocast
        self.tokenizer = load_tokenizer(path, "--reward")
        self.model = load_scorer(path, device, "--reward")
        self.step_separator = getattr(self.model.config, "step_separator", None)
        self.has_policy_tokens = same_ids(policy_tokenizer, self.tokenizer)
        self.check_context(examples)

    def check_context(self, examples):
        """Stop if prompts and completions are too long for this model."""
        context = min(context_of(self.model.config), self.tokenizer.model_max_length)
        try:
            longest = max([len(self.ids_of(example, [])) for example in examples], default=0)
        except BadRow as error:
            fail(f"--reward {self.path}: {error}")
        if longest + self.args.max_completion_length > context:
            fail(
                f"--reward {self.path}: prompts of {longest} tokens and "
                f"--max-completion-length do not fit its context of {context}"
            )

    def __call__(self, examples, completions):
        sequences = [self.ids_of(example, ids) for example, ids in zip(examples, completions)]
        masks = [self.mask_of(example, ids) for example, ids in zip(examples, sequences)]
        device = self.model.device
        batch = {
            # (a model's own forward may look for PAD)
            "inputs": pad_rows(sequences, device, value=self.model.config.pad_token_id or 0),
            "attention_mask": pad_rows([[1] * len(ids) for ids in sequences], device),
            "mask": pad_rows(masks, device),
        }
        with self.autocast():
            scores = in_micro_batches(
                lambda mb: scalar_head(self.model, mb),
                batch,
                self.args.micro_batch_tokens,
            )
        if not scores.isfinite().all():
            fail(f"--reward {self.path} gave a score that is not finite")
        if self.step_separator is not None:
            return (F.logsigmoid(scores) * batch["mask"]).amin(1).cpu()
        return scores.sum(1).cpu()

    def mask_of(self, example, ids):
        """1 where the score of a sequence is read: at the last token, or at the end of each step of
        the completion."""
        ends = [len(ids) - 1]
        if self.step_separator is not None:
            start = len(os.path.commonprefix([self.ids_of(example, []), ids]))
            ends = [start + t for t in step_ends(self.tokenizer, ids[start:], self.step_separator)]
            own_eos_ids = [end_of_turn_id(self.tokenizer), self.tokenizer.eos_token_id]
            eos_ids = self.eos_ids if self.has_policy_tokens else own_eos_ids
            if len(ends) > 1 and ids[-1] not in eos_ids:
                ends.pop()  # the last step was cut, and no score was trained there
        return [int(t in ends) for t in range(len(ids))]

    def ids_of(self, example, completion_ids):
        """Prompt and completion in this model's own tokens."""
        if self.has_policy_tokens:
            return example["prompt_ids"] + completion_ids
        prompt = example["prompt"]
        text = completion_text(self.policy_tokenizer, example["prompt_ids"], completion_ids)
        for token in control_tokens(self.tokenizer):  # as text: else it could end the turn
            text = text.replace(token, " ".join(token))
        is_chat = isinstance(prompt, list)
        whole = render(self.tokenizer, join_messages(prompt, text)) if is_chat else prompt + text
        end_id = end_of_turn_id(self.tokenizer)
        (ids,) = encode(self.tokenizer, [whole], is_chat)
        ids = end_once(self.tokenizer, ids, end_id, is_chat)
        # (an encoder's [SEP], which may be its EOS, ends a cut text too)
        is_cut = has_score_head(self.model) and not set(completion_ids[-1:]) & set(self.eos_ids)
        return ids[:-1] if is_cut and ids[-1] == end_id else ids


def load_rewards(args, examples, tokenizer, eos_ids, *, device, autocast):
    """--reward, the members of an ensemble with commas between -> list of functions (examples,
    completions) -> scores (B,) on the CPU, NaN where it cannot judge."""
    if args.reward is None:
        fail(f"--reward is missing: a reward model, {' or '.join(CHECKERS)}, or file.py:function")
    rewards = []
    for reward in args.reward.split(","):
        path, _, name = os.path.expanduser(reward).rpartition(":")
        if reward.endswith(".py"):
            fail(f"--reward {reward}: wanted is file.py:function")
        if path.endswith(".py"):
            sys.path.append(str(Path(path).resolve().parent))  # it may import what lies beside it
            functions = runpy.run_path(path) if Path(path).is_file() else {}
            if name not in functions:
                fail(f"--reward {reward}: no such file, or no function {name} in it")
            check_signature(functions[name], reward)
            rewards.append(checker_reward(functions[name], tokenizer, eos_ids))
        elif reward == "none":  # for distillation, where the KL is all
            if args.reward != "none" or not getattr(args, "reference", None):
                fail(f"--reward {args.reward}: none stands alone, beside --reference (rloo, grpo)")
            rewards.append(lambda examples, completions: torch.zeros(len(completions)))
        elif reward in CHECKERS:
            check_answers(examples, reward)
            rewards.append(checker_reward(CHECKERS[reward], tokenizer, eos_ids))
        else:
            model = RewardModel(
                os.path.expanduser(reward),
                args,
                examples,
                tokenizer,
                eos_ids=eos_ids,
                device=device,
                autocast=autocast,
            )
            rewards.append(model)
    return rewards


def check_signature(function, reward):
    """Stop unless a reward function can be called with prompts, completions and rows."""
    try:
        inspect.signature(function).bind([], [], [])
    except TypeError as error:
        fail(f"--reward {reward} is called with prompts, completions, rows ({error})")


def check_answers(examples, reward):
    """Stop at a row whose own answer a built-in checker does not find right."""
    for example in examples:
        answer = example["row"].get("answer")
        rows = [{"answer": answer, "finished": True}]
        if CHECKERS[reward]([""], [str(answer)], rows) != [1.0]:
            fail(f"{example['where']}: --reward {reward} finds no `answer` in {answer!r:.60}")


def load_gold(args, dataset, tokenizer, eos_ids):
    """The exact checker of a data set or of --reward, to be logged beside the score; None if there
    is none."""
    name = dataset if dataset in CHECKERS else getattr(args, "reward", None)
    return checker_reward(CHECKERS[name], tokenizer, eos_ids) if name in CHECKERS else None


# ---------------------------------------------------------------- 9. runs
def is_due(every, step, steps):
    """True after every `every`-th step (0: none of them) and after the last."""
    return step == steps or (every > 0 and step % every == 0)


def replace_file(path, write):
    """Write a file whole or not at all (the first process): flushed, then renamed."""
    if rank() > 0:
        return
    new = Path(f"{path}.new")
    with open(new, "wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(new, path)


def digest_of(examples, models):
    """A text that other data or other weights would change: exact, whatever the processes."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(repr([example["row"], example["prompt_ids"]]).encode())
    bits = 0
    for parameter in models.parameters():
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        bits += int(local.detach().view(torch.int32).sum(dtype=torch.int64))
    return f"{digest.hexdigest()} {all_reduce(bits)}"


WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


class Run:
    """A run's folder (args.json, digest, metrics, samples, checkpoint/, the model), its terminal.

    Only the first process writes files. Random numbers and the position in the data are functions
    of seed and step, so that a checkpoint is the step, the models and the optimiser."""

    def __init__(self, args, models, optimizer, steps, examples):
        self.args = args
        self.models = models
        self.optimizer = optimizer
        self.steps = steps
        self.dir = Path(args.output_dir)
        self.signal = 0
        self.agreed_signal = 0
        self.started = time.time()
        self.digest = digest_of(examples, models)
        on_first_rank(self.make_folder)
        self.bar = tqdm(total=steps, disable=None if rank() == 0 else True)
        caught = {signal.SIGINT, signal.SIGTERM}
        if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
            caught.add(signal.SIGHUP)  # (ignored: nohup)
        self.handlers = {number: signal.signal(number, self.interrupt) for number in caught}

    def make_folder(self):
        """A new folder. An earlier run that is there, as --overwrite allows, gets another name."""
        self.dir.mkdir(parents=True, exist_ok=True)
        self.lock = lock(self.dir)
        if (self.dir / "args.json").exists() and not self.args.resume:
            old = Path(f"{self.dir}.old")
            while old.exists():
                old = Path(f"{old}.old")
            self.dir.rename(old)
            print(f"{self.dir} held an earlier run; it is now {old}")
            self.lock.release(force=True)
            self.dir.mkdir()
            self.lock = lock(self.dir)

    # ------------------------------------------------ checkpoints
    def checkpoint(self, step):
        """Write what --resume needs, whole or not at all. All processes call it."""
        state = {
            "step": step,
            "models": get_model_state_dict(self.models, options=WHOLE),
            "optimizer": get_optimizer_state_dict(self.models, self.optimizer, options=WHOLE),
        }
        (self.dir / "checkpoint").mkdir(exist_ok=True)
        path = self.dir / "checkpoint" / "state.pt"
        on_first_rank(lambda: replace_file(path, lambda file: torch.save(state, file)))

    def restore(self):
        """With --resume read models and optimiser and cut the logs back to the checkpoint -> steps
        done, 0 without a checkpoint. Then the flags are written, which are now this run's."""
        digest = self.dir / "digest"
        if self.args.resume and digest.exists() and digest.read_text() != self.digest:
            fail(
                "--resume: data, their order or start model differ from those that "
                f"{self.dir} began with; give these, or start a new run in another --output-dir"
            )
        path = self.dir / "checkpoint" / "state.pt"
        step = -1  # without a checkpoint the run begins again, and so do its logs
        if path.exists():
            state = torch.load(path, map_location="cpu", weights_only=True)
            set_model_state_dict(self.models, state["models"], options=WHOLE)
            set_optimizer_state_dict(self.models, self.optimizer, state["optimizer"], options=WHOLE)
            step = state["step"]
        flags = json.dumps(vars(self.args) | {"resume": False}, indent=1)
        replace_file(self.dir / "args.json", lambda file: file.write(flags.encode()))
        replace_file(digest, lambda file: file.write(self.digest.encode()))
        if not self.args.resume:
            return 0
        for name in ("metrics.jsonl", "samples.jsonl"):
            rows = read_rows(self.dir / name)
            self.rewrite(name, [row for row in rows if row["step"] <= step])
        step = max(0, step)
        print(f"resumed after step {step} of {self.steps}")
        self.bar.update(step)
        return step

    def checkpoint_if_due(self, step, is_last=False):
        """After every --save-every-th step, after the last, and before a signal ends the run."""
        is_interrupted = self.is_interrupted()
        if is_interrupted or is_last or is_due(self.args.save_every, step, self.steps):
            self.checkpoint(step)
        if is_interrupted and step < self.steps:
            self.exit(f"step {step} of {self.steps}")

    # ------------------------------------------------ signals
    def interrupt(self, number, frame):
        """At the first Ctrl-C or SIGTERM finish the step, save, exit. A second one stops at once;
        with several processes it is ignored."""
        self.signal = number
        # (torchrun sends its own after Ctrl-C, and kills what is left in 30 s)
        for each in self.handlers:
            signal.signal(each, signal.SIG_DFL if world_size() == 1 else signal.SIG_IGN)

    def is_interrupted(self):
        """True in all processes if a signal came to one of them."""
        # (not into self.signal: one that comes during the all-reduce would be overwritten)
        self.agreed_signal = all_reduce(self.signal, op="max")
        return self.agreed_signal > 0

    def exit(self, done):
        """End with the status that shells expect after a signal; `done` says how far it came."""
        self.close()
        print(f"stopped after {done}; go on with --resume --output-dir {self.dir}", flush=True)
        raise SystemExit(128 + self.agreed_signal)

    def close(self):
        self.bar.close()
        if rank() == 0:
            self.lock.release(force=True)
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    # ------------------------------------------------ logs
    def append(self, name, rows):
        """Rows as JSON lines at the end of a log."""
        if rank() == 0:
            with open(self.dir / name, "a") as file:
                file.write(json_lines(rows))

    def rewrite(self, name, rows):
        """Rows as JSON lines instead of what a log held."""
        replace_file(self.dir / name, lambda file: file.write(json_lines(rows).encode()))

    def log(self, step, metrics, show=()):
        """A line of metrics.jsonl; what is in `show`, and evaluations, also for a person."""
        metrics = {name: float(value) for name, value in metrics.items()}
        if torch.cuda.is_available():
            metrics["peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
        self.append("metrics.jsonl", [{"step": step} | metrics])
        self.bar.update(step - self.bar.n)
        self.bar.set_postfix({name: metrics[name] for name in show if name in metrics})
        if self.bar.disable and show and is_due(self.args.log_every, step, self.steps):
            print(f"step {step}/{self.steps}: {self.bar.postfix}", flush=True)
        evaluations = [f"{name} {value:.3f}" for name, value in metrics.items() if "eval/" in name]
        if evaluations:
            tqdm.write(f"step {step}/{self.steps}: {', '.join(evaluations)}", file=sys.stdout)

    def log_samples(self, step, rows):
        """Rows of prompt, completion and numbers go to samples.jsonl; the first three are shown."""
        self.append("samples.jsonl", [{"step": step} | row for row in rows])
        for row in rows[:3]:
            tqdm.write(f"  {row['prompt']!r:.60} -> {row['completion']!r:.60}", file=sys.stdout)

    def finish(self, model, tokenizer, eos_ids, then):
        """Save model and tokenizer for from_pretrained, and say what to run next."""
        if model.can_generate():  # all EOS ids, and no top-k and top-p, which were not trained with
            model.generation_config = transformers.GenerationConfig(
                bos_token_id=tokenizer.bos_token_id,
                pad_token_id=tokenizer.pad_token_id,
                eos_token_id=eos_ids,
            )
        weights = None
        if isinstance(model, FSDPModule):
            weights = get_model_state_dict(model, options=WHOLE)
        on_first_rank(lambda: model.save_pretrained(self.dir, state_dict=weights))
        on_first_rank(lambda: tokenizer.save_pretrained(self.dir))
        if world_size() > 1:  # (not after a failure: it could wait for others)
            atexit.unregister(distributed.destroy_process_group)  # of an earlier run
            atexit.register(distributed.destroy_process_group)
        self.close()
        print(f"{time.time() - self.started:.0f} s; the model is in {self.dir}; next: {then}")


def json_lines(rows):
    """Rows as JSON lines; NaN, which JSON does not have, as null."""
    text = ""
    for row in rows:
        row = {name: None if value != value else value for name, value in row.items()}
        text += json.dumps(row, default=str) + "\n"
    return text


def read_rows(path):
    """Rows of a log of ours, without a last line that was cut off when the run was killed."""
    if not path.exists():
        return []
    lines = path.read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]
