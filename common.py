"""What the methods of RLHF share and no method is: models, data, sampling, rewards, and runs on disk.

Log-probs, advantages, losses, evaluation and update loops stand in the scripts. Here, in this order:
1. command line   2. processes   3. models   4. the built-in task   5. data   6. batches   7. sampling
8. rewards   9. runs"""

import atexit
import contextlib
import dataclasses
import functools
import hashlib
import importlib.util
import json
import math
import numbers
import os
import random
import re
import signal
import string
import sys
import textwrap
import time
import zlib
from collections import Counter
from decimal import Decimal
from pathlib import Path

import tokenizers
import torch
import transformers
import tyro
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
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

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

    Without --model it is the laptop run, for which `laptop` replaces the defaults. With --resume the flags
    saved in --output-dir are the defaults. What stands on the command line wins."""
    flags = {flag.partition("=")[0] for flag in sys.argv[1:]}
    is_laptop = "--model" not in flags
    laptop_flags = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in laptop.items())
    description = (
        sys.modules[Args.__module__].__doc__
        + f"\n\nThe defaults below hold with --model. Without it, the laptop run: {laptop_flags}"
    )
    default = Args(**laptop) if is_laptop and not flags & {"-h", "--help"} else Args()
    args = tyro.cli(Args, default=default, description=description)
    if args.resume:
        return tyro.cli(Args, default=saved_args(Args, args.output_dir))
    if is_laptop and (args.dataset != TASK or args.eval_dataset not in (None, TASK)):
        fail("--dataset of your own needs --model: the laptop run's model reads only the built-in task")
    for path, script in {"runs/sft": "sft.py", "runs/reward_model": "reward_model.py"}.items():
        is_needed = path in (args.model, getattr(args, "reward", None))
        if is_needed and not Path(path, "config.json").is_file():
            fail(f"{path} is not there: run `python {script}` first")
    return args


def saved_args(Args, output_dir):
    """The flags that the run in output_dir was started with."""
    path = Path(output_dir, "args.json")
    if not path.is_file():
        fail(f"--resume: {output_dir} holds no run; start it without --resume")
    saved = json.loads(path.read_text())
    if saved.keys() != {field.name for field in dataclasses.fields(Args)}:
        fail(f"--resume: {output_dir} holds a run of another script, or of another version of it")
    return Args(**saved)


def setup(args):
    """Choose the device and check --output-dir before anything loads -> device, autocast (a context)."""
    device = start_processes()
    folder = Path(args.output_dir)
    is_run = (folder / "args.json").is_file()
    if args.resume and not is_run:
        fail(f"--resume: {folder} holds no run; start it without --resume")
    if is_run and not args.resume and not args.overwrite:
        fail(f"{folder} holds a run: go on with --resume, or set it aside with --overwrite")
    if not is_run and folder.exists() and any(folder.iterdir()):
        fail(f"--output-dir {folder}: holds files, and they are no run; name a new folder")
    if args.track != "none" and importlib.util.find_spec(args.track) is None:
        fail(f"--track {args.track}: that package is not installed; run `pip install {args.track}`")
    if world_size() > 1:
        distributed.barrier()  # no process has written yet what another one looks for

    is_cuda = device.type == "cuda"
    if args.micro_batch_tokens is None:
        args.micro_batch_tokens = 16_384 if is_cuda else 4096
    dtype = args.dtype
    if dtype == "auto":  # emulated, as on older cards, bfloat16 is slower than float32
        has_bfloat16 = is_cuda and torch.cuda.is_bf16_supported(including_emulation=False)
        dtype = "bfloat16" if has_bfloat16 else "float32"
    name = torch.cuda.get_device_name() if is_cuda else f"{torch.get_num_threads()} CPU threads"
    print(f"device: {world_size()} x {name}; weights float32, compute {dtype}")

    def autocast():
        return torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == "bfloat16")

    return device, autocast


def generator(seed, *purpose):
    """A torch.Generator that its arguments determine: a resumed run has no generator state to restore."""
    digest = hashlib.sha256(repr((seed, *purpose)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


# ---------------------------------------------------------------- 2. processes
# One process has none of this in its way. Under torchrun each model is split over all processes (FSDP2), each
# takes its share of every batch, and sums run over all of them: the same numbers as with one.
def rank():
    """The number of this process among those that torchrun started; 0 with one."""
    return int(os.environ["RANK"]) if distributed.is_torchelastic_launched() else 0


def world_size():
    """The number of processes."""
    return int(os.environ["WORLD_SIZE"]) if distributed.is_torchelastic_launched() else 1


def start_processes():
    """Join the processes that torchrun has started, if it has -> this one's device. Only the first prints."""
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    if world_size() == 1:
        return torch.device(kind)
    device = torch.device(kind, int(os.environ["LOCAL_RANK"])) if kind == "cuda" else torch.device(kind)
    if not distributed.is_initialized():
        if kind == "cuda":
            torch.cuda.set_device(device)
        distributed.init_process_group("cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo")
        if rank() > 0:
            sys.stdout = open(os.devnull, "w")
    return device


def all_reduce(value, op="sum"):
    """The sum ("max": the largest) of a number or tensor over all processes, the same in each."""
    if world_size() == 1:
        return value
    total = torch.as_tensor(value).clone()
    distributed.all_reduce(total, distributed.ReduceOp.SUM if op == "sum" else distributed.ReduceOp.MAX)
    return total if isinstance(value, torch.Tensor) else total.item()


def on_first_rank(function):
    """What function() returns in the first process, in all of them; the others do not call it."""
    result = [function() if rank() == 0 else None]
    if world_size() > 1:
        distributed.broadcast_object_list(result)
    return result[0]


def shard(model, device):
    """The model on its device; with several processes its parameters, gradients and optimiser state split
    over them, layer by layer (FSDP2)."""
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
    """Decorates function(model, ...), which calls parts of a model: FSDP gathers them as for its forward."""

    @functools.wraps(function)
    def run(model, *args, **kwargs):
        if isinstance(model, FSDPModule):
            return model.run(function, *args, **kwargs)
        return function(model, *args, **kwargs)

    return run


@contextlib.contextmanager
def unsharded(model):
    """The whole model in each process while it samples, so that none waits for another at each token."""
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
    try:
        return cls.from_pretrained(path, **options)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        reason = str(error).strip().partition("\n")[0]
        fail(f"{flag} {path}: no directory or Hub id that can be loaded ({reason})")


def load_tokenizer(path, flag="--model"):
    """The tokenizer of a directory or Hub id. One without PAD pads with EOS: masks come from lengths."""
    tokenizer = from_pretrained(AutoTokenizer, path, flag)
    if tokenizer.eos_token_id is None and flag == "--model":
        fail(f"{flag} {path}: the tokenizer has no EOS token, so nothing could end; set its eos_token")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def end_of_turn_id(tokenizer):
    """The id that ends a completion: what the chat template puts after an assistant's text, else EOS."""
    if tokenizer.chat_template is None:
        return tokenizer.eos_token_id
    messages = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "good-bye"}]
    after = render(tokenizer, messages).rpartition("good-bye")[2]
    added = tokenizer.added_tokens_decoder
    for token_id in tokenizer(after, add_special_tokens=False).input_ids:
        if token_id in added and added[token_id].special:
            return token_id
    return tokenizer.eos_token_id


def find_eos_ids(tokenizer, path):
    """All ids that end a completion, sorted: of tokenizer, chat template and generation config."""
    eos_ids = {tokenizer.eos_token_id, end_of_turn_id(tokenizer)}
    if path is not None:
        try:
            configured = transformers.GenerationConfig.from_pretrained(path).eos_token_id
        except OSError:  # a model without a generation config
            configured = from_pretrained(AutoConfig, path, "--model").eos_token_id
        eos_ids |= set(configured if isinstance(configured, list) else [configured])
    return sorted(eos_ids - {None})


def load_config(path, flag):
    """Its config, dropout and jitter off: else two forwards differ, and the first update's ratio is not 1."""
    config = from_pretrained(AutoConfig, path, flag)
    for part in (config, config.get_text_config()):
        for name, value in part.to_dict().items():
            if re.search("drop|jitter", name) and type(value) in (int, float):
                setattr(part, name, 0.0)
    return config


def context_of(config):
    """Positions that a model was made for; infinite where its config does not say."""
    return getattr(config.get_text_config(), "max_position_embeddings", None) or math.inf


def check_context(path, tokens, flag):
    """Stop if sequences of that many tokens do not fit the positions that a model was made for."""
    context = context_of(from_pretrained(AutoConfig, path, "--model"))
    if tokens > context:
        fail(f"sequences of {tokens} tokens do not fit the context of {path}, {context}: lower {flag}")


def load_policy(path, device, trainable=False, gradient_checkpointing=False, config=None):
    """A causal language model with float32 weights, on its device.

    Without a path a model with random weights of that config, for the laptop run."""
    if path is None:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    else:
        model = from_pretrained(
            AutoModelForCausalLM,
            path,
            "--model",
            config=load_config(path, "--model"),
            dtype=torch.float32,
            use_safetensors=True,  # nothing is unpickled
        )
    check_head(model)
    return prepare(model, device, trainable, gradient_checkpointing)


def load_scorer(path, device, flag, *, trainable=False, gradient_checkpointing=False, init_head=None, pad_for=None):
    """A sequence-classification model with one output, float32 weights, on its device.

    init_head: a function that fills the weight (1, H) of the new head of a language model; without it a
    language model is an error. pad_for: tokenizer and EOS ids, for a PAD of its own (see choose_pad)."""
    config = load_config(path, flag)
    architecture = (config.architectures or ["model of unknown architecture"])[0]
    is_scorer = architecture.endswith("ForSequenceClassification")
    if not is_scorer and init_head is None:
        fail(f"{flag} {path}: a {architecture}, not a reward model; train one with reward_model.py")
    if is_scorer and config.num_labels != 1:
        fail(f"{flag} {path}: a classifier with {config.num_labels} labels; a reward model has one output")
    config.num_labels = 1
    model = from_pretrained(
        AutoModelForSequenceClassification,
        path,
        flag,
        config=config,
        dtype=torch.float32,
        use_safetensors=True,
    )
    if trainable and not has_score_head(model):
        fail(f"{flag} {path}: {type(model).__name__} has no plain `score` head; use a decoder-only model")
    if not is_scorer:
        with torch.no_grad():
            init_head(model.score.weight)
    if pad_for is not None:
        choose_pad(model, *pad_for)
    return prepare(model, device, trainable, gradient_checkpointing)


def has_score_head(model):
    """True for a head that is one product with the last hidden state."""
    head = getattr(model, "score", None)
    return isinstance(head, nn.Linear) and head.bias is None


def prepare(model, device, trainable, gradient_checkpointing):
    """Dropout off, gradients on or off, split over processes if there are several."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model.train(trainable)
    model.requires_grad_(trainable)
    if gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    return shard(model, device)


def head_logits(model, hidden):
    """(N, H) last hidden states -> (N, V) float32 logits, scaled and capped as in the model's own forward."""
    config = model.config.get_text_config()
    logits = model.get_output_embeddings()(hidden).float()
    if getattr(config, "logits_scaling", None):  # Granite
        logits = logits / config.logits_scaling
    if getattr(config, "logit_scale", None):  # Cohere
        logits = logits * config.logit_scale
    if getattr(config, "final_logit_softcapping", None):  # Gemma 2 and later
        logits = torch.tanh(logits / config.final_logit_softcapping) * config.final_logit_softcapping
    return logits


@torch.no_grad()
def check_head(model):
    """Stop if head_logits, or left padding, gives other log-probs than the model's own forward."""
    name = type(model).__name__
    if model.base_model is model:
        fail(f"{name} does not say which part of it is without the head (base_model)")
    ids = torch.arange(1, 5)[None]
    expected = model(input_ids=ids, use_cache=False).logits[0].float().log_softmax(-1)
    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0]
    if not torch.allclose(head_logits(model, hidden).log_softmax(-1), expected, atol=1e-3):
        fail(f"{name} changes its logits in a way that head_logits in common.py does not know: add it")
    attention_mask = F.pad(torch.ones_like(ids), (2, 0))
    padded = model(
        input_ids=F.pad(ids, (2, 0)),
        attention_mask=attention_mask,
        position_ids=(attention_mask.cumsum(1) - 1).clamp(min=0),
        use_cache=False,
    ).logits[0, 2:]
    if not torch.allclose(padded.float().log_softmax(-1), expected, atol=1e-3):
        fail(f"{name} counts positions in a way of its own: its prompts cannot be padded")


def choose_pad(model, tokenizer, eos_ids):
    """Give a reward model a PAD that is no EOS: transformers scores at the last id that is not PAD."""
    added = tokenizer.added_tokens_decoder
    named = [i for i, token in added.items() if token.special and "pad" in token.content.lower()]
    candidates = [tokenizer.pad_token_id, *named, tokenizer.unk_token_id]
    pad_id = next((i for i in candidates if i is not None and i not in eos_ids), None)
    if pad_id is None:
        tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    else:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pad_id)
    if tokenizer.pad_token_id >= model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.config.pad_token_id = tokenizer.pad_token_id


# ---------------------------------------------------------------- 4. the built-in task: letters into order
TASK = "sort"
LETTERS = "abcdefghijklmnopqrstuvwxyz"
TASK_ROWS = {"sft": 165, "preference": 40_000, "prompt": 20_000, "held out": 500}  # demonstrations are scarce


def task_rows(kind, held_out, seed, chat=False):
    """Rows of the built-in task, 4 to 7 different letters: prompt `dbca>` (`chat`: messages), answer `abcd`.

    Whether letters are held out depends on them alone; held-out rows are the same for every seed. A rejected
    answer has a slip or two and, like most mistakes of a half-trained model, is in order half of the time."""
    rng = random.Random(f"{'held out' if held_out else seed}/{kind == 'preference'}")
    rows = []
    while len(rows) < TASK_ROWS["held out" if held_out else kind]:
        letters = "".join(rng.sample(LETTERS, rng.randint(4, 7)))
        if (zlib.crc32(letters.encode()) % 8 == 0) != held_out:
            continue
        answer = "".join(sorted(letters))
        row = {"prompt": f"{letters}>", "answer": answer}
        if chat:
            request = f"Put these letters into alphabetical order: {letters}"
            row["prompt"] = [{"role": "user", "content": request}]
        if kind == "sft":
            row["completion"] = answer
        if kind == "preference":
            row["chosen"] = answer
            row["rejected"] = wrong_answer(answer, rng)
        rows.append(row)
    return rows


def wrong_answer(answer, rng):
    """A rejected answer: a slip or two, and most are put into order again."""
    wrong = answer
    while wrong == answer:
        wrong = slip(wrong if rng.random() < 0.7 else slip(wrong, rng), rng)
        wrong = "".join(sorted(wrong)) if rng.random() < 0.6 else wrong
    return wrong


def slip(text, rng):
    """`text` with one slip: a wrong letter, two neighbours swapped, a letter left out, doubled or put in."""
    wrong = text
    while wrong == text:
        i = rng.randrange(len(text))
        letter = rng.choice(LETTERS)
        before, here, after = text[:i], text[i], text[i + 1 :]
        swapped = before + after[:1] + here + after[1:]
        replaced = before + letter + after
        left_out = before + after
        doubled = before + here + here + after
        put_in = before + letter + here + after
        wrong = rng.choice([swapped, replaced, replaced, left_out, doubled, put_in])
    return wrong


def task_checker(prompts, completions, rows):
    """1.0 for exactly the letters in order and then EOS, else 0.0."""
    return [float(row["finished"] and text.strip() == row["answer"]) for text, row in zip(completions, rows)]


def tiny_tokenizer():
    """One token a letter, `>`, PAD, EOS and UNK; no BOS, no chat template."""
    vocab = {token: i for i, token in enumerate(["[PAD]", "[EOS]", "[UNK]", ">", *LETTERS])}
    letters = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="[UNK]"))
    letters.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex("."), "isolated")
    letters.decoder = tokenizers.decoders.Fuse()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=letters,
        pad_token="[PAD]",
        eos_token="[EOS]",
        unk_token="[UNK]",
        model_max_length=64,
    )


def tiny_config(tokenizer):
    """A Llama of 0.8M parameters."""
    return transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=64,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )


# ---------------------------------------------------------------- 5. data
PROMPT_COLUMNS = ("prompt", "instruction", "question")
COMPLETION_COLUMNS = ("completion", "output", "answer")
READ_COLUMNS = {*PROMPT_COLUMNS, *COMPLETION_COLUMNS, "messages", "chosen", "rejected", "margin"}


class BadRow(Exception):
    """What is wrong with a row, for which a run stops."""


class DroppedRow(Exception):
    """Why a row is left out and counted: it is well-formed, and cannot be used whole."""


def load_examples(dataset, kind, tokenizer, args, held_out=False):
    """Read, check and tokenise a data set -> list of examples, dicts with `prompt` as in the file, `row`,
    `where` (file and line) and, by kind,

        sft         prompt_ids, ids, mask (1 on trained tokens; of one length with ids)
        preference  prompt_ids, chosen_ids, rejected_ids, margin
        prompt      prompt_ids

    A row that cannot be used whole is dropped and counted, never cut."""
    make_example = {"sft": sft_example, "preference": preference_example, "prompt": prompt_example}[kind]
    end_id = end_of_turn_id(tokenizer)
    if dataset == TASK:
        rows = task_rows(kind, held_out, args.seed, chat=tokenizer.chat_template is not None)
        rows = [(f"{TASK} row {number}", row) for number, row in enumerate(rows, 1)]
    elif dataset.endswith((".jsonl", ".json")):
        rows = read_file(dataset)
    else:
        rows = read_hub(dataset)

    examples = []
    dropped = Counter()
    columns = set()
    for where, row in rows:
        try:
            if not isinstance(row, dict):
                raise BadRow(f"is a {type(row).__name__}, not an object")
            examples.append({"row": row, "where": where} | make_example(row, tokenizer, end_id, args))
        except BadRow as error:
            fail(f"{where}: {error}")
        except DroppedRow as error:
            dropped[str(error)] += 1
        columns |= row.keys()

    report = f"{dataset}{' (held out)' if held_out else ''}: {len(examples)} of {len(rows)} rows"
    for reason, count in dropped.items():
        report += f"; {count} dropped {reason}"
    if not examples:
        fail(f"{report}: nothing is left")
    print(report)
    template_columns = {name for _, name, _, _ in string.Formatter().parse(args.prompt_template)}
    unread = columns - READ_COLUMNS - template_columns
    if kind != "prompt" and unread and dataset != TASK:
        print(f"{dataset}: columns that are not used: {', '.join(sorted(unread))}")
    return examples


def load_held_out(kind, tokenizer, args):
    """Examples of --eval-dataset, or the built-in task's own held-out rows; else none, and a line says so."""
    dataset = args.eval_dataset or (TASK if args.dataset == TASK else None)
    if dataset is None:
        print("no --eval-dataset: nothing is held out")
        return []
    return load_examples(dataset, kind, tokenizer, args, held_out=True)


def read_file(path):
    """(file and line, row) of a .jsonl file, or of a .json file that holds one list."""
    if not Path(path).is_file():
        fail(f"{path}: there is no such file")
    number = 0
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        if path.endswith(".json"):
            rows = json.loads(text)
            if not isinstance(rows, list):
                fail(f"{path}: holds one {type(rows).__name__}, not a list of objects")
            return [(f"{path} row {number}", row) for number, row in enumerate(rows, 1)]
        rows = []
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                rows.append((f"{path} line {number}", json.loads(line)))
        return rows
    except OSError as error:
        fail(f"{path}: cannot be read ({error.strerror})")
    except UnicodeDecodeError as error:
        fail(f"{path}: is not UTF-8 ({error.reason} at byte {error.start})")
    except (ValueError, RecursionError) as error:
        where = f"{path} line {number}" if number else path
        fail(f"{where}: broken JSON ({error}); wanted one object a line, or in .json one list of objects")


def read_hub(dataset):
    """(name and row, row) of a Hub data set, `name` or `name:split`."""
    if importlib.util.find_spec("datasets") is None:
        fail(f"{dataset}: no .jsonl or .json file; to read it from the Hub, run `pip install datasets`")
    import datasets

    name, _, split = dataset.partition(":")
    try:
        rows = datasets.load_dataset(name, split=split or "train")
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).strip().partition("\n")[0]
        fail(f"{dataset}: cannot be loaded from the Hub ({reason})")
    return [(f"{dataset} row {number}", row) for number, row in enumerate(rows, 1)]


def sft_example(row, tokenizer, end_id, args):
    """Prompt and completion, or messages, of which the last assistant turn is trained, or all of them."""
    if "messages" in row:
        messages = text_or_messages(row, "messages")
        roles = [message["role"] for message in messages] if isinstance(messages, list) else []
        turns = [i for i, role in enumerate(roles) if role == "assistant" and i > 0]
        if not turns:
            raise BadRow("`messages` has no assistant turn after the first message: nothing to train on")
        if args.train_on == "last":
            turns = turns[-1:]
        pairs = [(messages[:i], messages[i : i + 1]) for i in turns]
    else:
        pairs = [(prompt_of(row, args), text_or_messages(row, *COMPLETION_COLUMNS))]
    encoded = [encode_pair(tokenizer, prompt, completion, end_id) for prompt, completion in pairs]
    prompt_ids, completion_ids = encoded[-1]
    ids = prompt_ids + completion_ids
    check_length(ids, args.max_length, "--max-length")
    mask = [0] * len(ids)
    for turn_prompt_ids, turn_ids in encoded:
        end = len(turn_prompt_ids) + len(turn_ids)
        if ids[:end] != turn_prompt_ids + turn_ids:
            raise DroppedRow("whose turns the chat template does not render as prefixes")
        mask[len(turn_prompt_ids) : end] = [1] * len(turn_ids)
    return {"prompt": pairs[-1][0], "prompt_ids": prompt_ids, "ids": ids, "mask": mask}


def preference_example(row, tokenizer, end_id, args):
    """Prompt, chosen and rejected, or chosen and rejected that begin alike; `margin` is optional."""
    chosen = text_or_messages(row, "chosen")
    rejected = text_or_messages(row, "rejected")
    has_prompt = any(name in row for name in PROMPT_COLUMNS)
    if isinstance(chosen, list) and isinstance(row.get("prompt"), str):
        has_prompt = False  # UltraFeedback's form: the prompt stands in both conversations, too
    if has_prompt:
        prompt = prompt_of(row, args)
    else:
        prompt, chosen, rejected = split_shared_prefix(chosen, rejected)
    margin = 0.0 if row.get("margin") is None else row["margin"]
    if type(margin) not in (int, float) or not abs(margin) < 1e9:
        raise BadRow(f"`margin` must be a number, found {str(margin)[:60]}")
    prompt_ids, chosen_ids = encode_pair(tokenizer, prompt, chosen, end_id)
    _, rejected_ids = encode_pair(tokenizer, prompt, rejected, end_id)
    check_length(prompt_ids + max(chosen_ids, rejected_ids, key=len), args.max_length, "--max-length")
    if chosen_ids == rejected_ids:
        raise DroppedRow("whose chosen and rejected are the same in tokens")
    return {
        "prompt": prompt,
        "prompt_ids": prompt_ids,
        "chosen_ids": chosen_ids,
        "rejected_ids": rejected_ids,
        "margin": float(margin),
    }


def prompt_example(row, tokenizer, end_id, args):
    """A prompt; the further columns are the checker's."""
    prompt = prompt_of(row, args)
    if isinstance(prompt, list):
        check_control_tokens(tokenizer, prompt)
        prompt_ids = encode(tokenizer, render(tokenizer, prompt, add_generation_prompt=True), is_chat=True)
    else:
        prompt_ids = encode(tokenizer, prompt, is_chat=False)
    if not prompt_ids:
        raise DroppedRow("whose prompt is empty")
    check_length(prompt_ids, args.max_prompt_length, "--max-prompt-length")
    return {"prompt": prompt, "prompt_ids": prompt_ids}


def text_or_messages(row, *names):
    """The first of these columns that the row has: a text, or a list of {"role", "content"}."""
    name = next((name for name in names if name in row), None)
    if name is None:
        raise BadRow(f"no column {' or '.join(names)} among {', '.join(row) or 'none'}")
    value = row[name]
    messages = value if isinstance(value, list) and value else [None]
    texts = [value]
    if not isinstance(value, str):
        texts = [m.get(key) if isinstance(m, dict) else m for m in messages for key in ("role", "content")]
    if not all(isinstance(text, str) for text in texts):
        raise BadRow(f"`{name}` is no text and no list of messages with texts role and content: {value!r:.80}")
    if any("\ud800" <= letter <= "\udfff" for text in texts for letter in text):
        raise BadRow(f"`{name}` holds half of a surrogate pair, which is no text")
    return value


def prompt_of(row, args):
    """The prompt of a row: a column as it is, or several through --prompt-template."""
    if args.prompt_template == "{prompt}":
        return text_or_messages(row, *PROMPT_COLUMNS)
    if isinstance(row.get("prompt"), list):
        raise BadRow("--prompt-template is for texts, and `prompt` is a list of messages")
    try:
        prompt = args.prompt_template.format(**row)
    except (LookupError, ValueError, AttributeError, TypeError) as error:
        found = ", ".join(row)
        raise BadRow(f"--prompt-template {args.prompt_template!r} does not fit {found} ({error!r})") from error
    return text_or_messages({"--prompt-template": prompt}, "--prompt-template")


def split_shared_prefix(chosen, rejected):
    """chosen and rejected that begin alike -> prompt, chosen, rejected.

    Of messages all equal ones but the last are the prompt; of texts all up to the last "Assistant:" that they
    share (Anthropic's form), or up to the last white space."""
    if type(chosen) is not type(rejected):
        raise BadRow("`chosen` and `rejected` must both be texts or both be lists of messages")
    same = [a == b for a, b in zip(chosen, rejected)]
    cut = (same + [False]).index(False)
    if isinstance(chosen, list):
        cut = min(cut, len(chosen) - 1, len(rejected) - 1)
    else:
        match = re.match(r"(.*\n\nAssistant:)|(.*)(?=\s)", chosen[:cut], re.DOTALL)
        cut = match.end() if match else 0
    if cut == 0:
        raise BadRow("has no prompt, and `chosen` and `rejected` do not begin alike")
    return chosen[:cut], chosen[cut:], rejected[cut:]


def render(tokenizer, messages, add_generation_prompt=False):
    """Messages -> text by the tokenizer's chat template."""
    if tokenizer.chat_template is None:
        raise BadRow("messages need a chat template, and the tokenizer has none (instruct models have one)")
    try:
        return tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except Exception as error:  # jinja2's errors, and whatever a template raises
        raise BadRow(f"the chat template refuses these messages ({' '.join(str(error).split())})") from error


def encode(tokenizer, text, is_chat):
    """A text's ids. A chat template writes BOS itself; to a plain text the tokenizer adds it, once."""
    ids = tokenizer(text, add_special_tokens=not is_chat, verbose=False).input_ids
    eos_added = ids[-1:] == [tokenizer.eos_token_id] and not text.endswith(tokenizer.eos_token)
    return ids[:-1] if eos_added else ids  # (some tokenizers add EOS, to prompts too)


def encode_pair(tokenizer, prompt, completion, end_id):
    """prompt and completion, texts or messages -> prompt_ids, completion_ids, the latter with one EOS.

    Both are tokenised as one text and split where the prompt's tokens end, so that the boundary is the one
    that the model sees when it samples."""
    is_chat = isinstance(prompt, list)
    if is_chat:
        messages = join_messages(prompt, completion)
        check_control_tokens(tokenizer, messages)
        text = render(tokenizer, prompt, add_generation_prompt=True)
        whole = render(tokenizer, messages)
    elif isinstance(completion, str):
        text = prompt
        whole = prompt + completion
    else:
        raise BadRow("the prompt is a text, so the answer must be a text too, not messages")
    prompt_ids = encode(tokenizer, text, is_chat)
    ids = encode(tokenizer, whole, is_chat)
    if not prompt_ids or ids[: len(prompt_ids)] != prompt_ids:
        raise DroppedRow("whose prompt is empty or, in tokens, no prefix of prompt and completion")
    return prompt_ids, end_once(tokenizer, ids[len(prompt_ids) :], end_id, is_chat)


def join_messages(prompt, completion):
    """Messages of a prompt and of a completion, which may be a text."""
    if isinstance(completion, str):
        completion = [{"role": "assistant", "content": completion}]
    return prompt + completion


def end_once(tokenizer, ids, end_id, is_chat):
    """A completion's ids with one EOS at their end, without what a chat template puts after it."""
    if is_chat and end_id in ids:
        return ids[: len(ids) - ids[::-1].index(end_id)]
    if end_id is None or ids[-1:] in ([end_id], [tokenizer.eos_token_id]):
        return ids
    return [*ids, end_id]


def control_tokens(tokenizer):
    """Texts that a tokenizer reads as control: in the content of a message they could end the turn."""
    added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    return (added | set(tokenizer.all_special_tokens)) - {""}


def check_control_tokens(tokenizer, messages):
    """Drop a row whose messages spell one. A text may: people bring prompts that are rendered already."""
    text = " ".join(message["role"] + " " + message["content"] for message in messages)
    if any(token in text for token in control_tokens(tokenizer)):
        raise DroppedRow("whose messages spell a control token of the tokenizer")


def check_length(ids, limit, flag):
    if len(ids) > limit:
        raise DroppedRow(f"longer than {flag} {limit}")


def stream(examples, seed, start, stop):
    """Examples start to stop - 1 of an endless stream: each pass over the data has an order of its own."""
    n = len(examples)
    found = []
    for epoch in range(start // n, (stop - 1) // n + 1):
        order = torch.randperm(n, generator=generator(seed, "shuffle", epoch)).tolist()
        first = max(0, start - epoch * n)
        found += [examples[i] for i in order[first : stop - epoch * n]]
    return found


# ---------------------------------------------------------------- 6. batches
# tokens below which a pass takes as long as a smaller one. CPU: measured; GPU: an estimate for 0.5B parameters
SMALL_BATCH = 4096 if torch.cuda.is_available() else 256


def pad_rows(rows, device, value=0):
    """Lists of numbers -> (B, T), right-padded."""
    width = max(map(len, rows))
    return torch.tensor([row + [value] * (width - len(row)) for row in rows], device=device)


def make_batch(sequences, masks, device):
    """Lists of T+1 ids, and of 0 and 1 (trained) of equal lengths -> a batch: a dict of tensors (B, T).

    inputs is all but a sequence's last token, targets all but its first, and mask is 1 where the target is
    trained: column t of anything speaks of targets[:, t]. Masks come from lengths, so that PAD, which is never
    read, may be any id, EOS too."""
    return {
        "inputs": pad_rows([ids[:-1] for ids in sequences], device),
        "targets": pad_rows([ids[1:] for ids in sequences], device),
        "attention_mask": pad_rows([[1] * (len(ids) - 1) for ids in sequences], device),
        "mask": pad_rows([mask[1:] for mask in masks], device),
    }


def completion_batch(prompts, completions, device):
    """Lists of prompt ids and of completion ids -> a batch whose mask is 1 on completions, EOS included."""
    sequences = [p + c for p, c in zip(prompts, completions)]
    masks = [[0] * len(p) + [1] * len(c) for p, c in zip(prompts, completions)]
    return make_batch(sequences, masks, device)


def take(batch, rows):
    """Some rows of every tensor of a batch, those of (B, T) cut to the longest of these rows.

    Of no rows it makes two that count for nothing, all 0: where there are several processes, each must go
    through the model as often as the others."""
    if len(rows) == 0:
        nothing = {name: torch.zeros_like(x[:1]).repeat_interleave(2, 0) for name, x in batch.items()}
        nothing["attention_mask"][:, 0] = 1
        rows = [0, 1]
        batch = nothing
    width = batch["attention_mask"][rows].sum(1).max()
    return {name: x[rows, :width] if x.ndim == 2 else x[rows] for name, x in batch.items()}


def micro_batch_rows(batch, budget, together):
    """Row numbers of the micro-batches of this process: lists, of which the last may be empty."""
    lengths = batch["attention_mask"].sum(1).view(-1, together).amax(1).tolist()
    order = sorted(range(len(lengths)), key=lambda group: -lengths[group])
    lists = []
    for group in order[rank() :: world_size()]:
        longest = lengths[lists[-1][0]] if lists else math.inf
        tokens = longest * together * (len(lists[-1]) + 1) if lists else math.inf
        is_uneven = lengths[group] < 0.9 * longest and tokens > SMALL_BATCH
        if tokens > budget or is_uneven:
            lists.append([])
        lists[-1].append(group)
    lists += [[]] * (all_reduce(len(lists), op="max") - len(lists))
    return [[group * together + i for group in groups for i in range(together)] for groups in lists]


def micro_batches(batch, budget, together=1):
    """Cut a batch into what goes through a model at once: with padding at most `budget` tokens, or one row.

    Rows of about one length stand together, none shorter than nine tenths of the longest unless the
    micro-batch is small. So many rows as `together` says, side by side, stay together (2: the two of a pair).
    Each of W processes takes every W-th row, and as many micro-batches as any other."""
    for rows in micro_batch_rows(batch, budget, together):
        yield take(batch, rows)


@torch.no_grad()
def in_micro_batches(function, batch, budget):
    """function(micro-batch), a tuple of tensors (b, t) or (b,), over a whole batch -> tensors (B, T) or (B,)."""
    results = []
    for rows in micro_batch_rows(batch, budget, together=1):
        values = function(take(batch, rows))
        if not results:
            shape = batch["inputs"].shape
            results = [x.new_zeros(shape[: x.ndim]) for x in values]
        for result, x in zip(results, values):
            if x.ndim == 2:
                x = F.pad(x, (0, result.shape[1] - x.shape[1]))
            result[rows] = x[: len(rows)]
    return [all_reduce(result) for result in results]


# ---------------------------------------------------------------- 7. sampling
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
    token_budget=65_536,
):
    """Sample from all of softmax(logits / temperature): no top-k, no top-p, no settings of the checkpoint.

    prompts: P lists of ids -> P * num_generations completions, lists of ids, a prompt's side by side. A
    completion ends with its EOS, or after max_new_tokens. temperature 0: greedy. Ids that a model has and its
    tokenizer lacks can be drawn too, and PAD. Noise belongs to row and step (one uniform number each), so that
    neither dropping finished rows nor token_budget, the tokens that are sampled at a time, changes a token.
    Each of W processes samples for every W-th prompt."""
    if temperature < 0:
        raise ValueError(f"the temperature is {temperature}, and it cannot be negative")
    noise = torch.rand(len(prompts), num_generations, max_new_tokens, generator=rng, dtype=torch.float64)
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    order = order[rank() :: world_size()]
    row_tokens = max(map(len, prompts)) + max_new_tokens
    prompts_at_a_time = max(1, token_budget // (num_generations * row_tokens))
    completions = {}
    was_training = model.training
    model.eval()  # in train mode gradient checkpointing would drop the cache
    with unsharded(model):
        for start in range(0, len(order), prompts_at_a_time):
            indices = order[start : start + prompts_at_a_time]
            tokens = sample_rows(
                model,
                [prompts[i] for i in indices],
                noise[indices].flatten(0, 1).to(model.device),
                temperature,
                torch.tensor(eos_ids, device=model.device),
            )
            for i, group in zip(indices, tokens.view(len(indices), num_generations, -1).tolist()):
                completions[i] = [cut_at_eos(ids, eos_ids) for ids in group]
    model.train(was_training)
    if world_size() > 1:
        parts = [None] * world_size()
        distributed.all_gather_object(parts, completions)
        completions = {i: group for part in parts for i, group in part.items()}
    return [ids for i in range(len(prompts)) for ids in completions[i]]


def sample_rows(model, prompts, noise, temperature, eos_ids):
    """P prompts, noise (B, max_new_tokens) -> tokens (B, max_new_tokens), 0 after a row's EOS.

    Each prompt, left-padded, goes through the model once; its generations start from copies of its keys and
    values. Rows that have ended leave the batch when they are a quarter of it: each time copies the cache."""
    device = noise.device
    B, max_new_tokens = noise.shape
    num_generations = B // len(prompts)
    width = max(map(len, prompts))
    inputs = torch.tensor([[0] * (width - len(ids)) + ids for ids in prompts], device=device)
    attention_mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts], device=device)
    # left padding without positions of its own is wrong for learned ones (GPT-2)
    position_ids = (attention_mask.cumsum(1) - 1).clamp(min=0)
    cache = transformers.DynamicCache(config=model.config)
    logits = model(
        input_ids=inputs,
        attention_mask=attention_mask,
        position_ids=position_ids,
        cache=cache,
        use_cache=True,
        logits_to_keep=1,
    ).logits[:, -1]
    cache.batch_repeat_interleave(num_generations)
    logits = logits.repeat_interleave(num_generations, 0)
    attention_mask = attention_mask.repeat_interleave(num_generations, 0)
    position_ids = position_ids[:, -1:].repeat_interleave(num_generations, 0)

    tokens = torch.zeros(B, max_new_tokens, dtype=torch.long, device=device)
    row = torch.arange(B, device=device)  # which row of `tokens` each row of the cache belongs to
    unfinished = torch.ones(B, dtype=torch.bool, device=device)
    for t in range(max_new_tokens):
        token = draw(logits.float(), temperature, noise[row, t])
        tokens[row[unfinished], t] = token[unfinished]
        unfinished = unfinished & ~torch.isin(token, eos_ids)
        number_unfinished = int(unfinished.sum())
        if number_unfinished == 0 or t + 1 == max_new_tokens:
            break
        if number_unfinished <= 0.75 * len(row):
            cache.batch_select_indices(unfinished.nonzero()[:, 0])
            attention_mask = attention_mask[unfinished]
            position_ids = position_ids[unfinished]
            token = token[unfinished]
            row = row[unfinished]
            unfinished = unfinished[unfinished]
        attention_mask = F.pad(attention_mask, (0, 1), value=1)
        position_ids = position_ids + 1
        logits = model(
            input_ids=token[:, None],
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            use_cache=True,
        ).logits[:, -1]
    return tokens


def draw(logits, temperature, noise):
    """One token a row, (b, V) and uniform noise (b,) -> (b,), by the inverse of the distribution function."""
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
    """decode(prompt + completion) less decode(prompt), no special tokens; alone it could lose a space."""
    decode = functools.partial(
        tokenizer.decode, skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    prompt = decode(prompt_ids)
    whole = decode(prompt_ids + completion_ids)
    return whole[len(prompt) :] if whole.startswith(prompt) else decode(completion_ids)


# ---------------------------------------------------------------- 8. rewards
# a number that stands alone, not in a fraction: sign and `$` in either order, thousands commas, decimals
SIGN = r"(?<![\w.^/])(?:(?<![-−])[-−]\$?|\$[-−]?)?"
NUMBER = SIGN + r"(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+)?(?<=\d)(?!\d|,\d{3}|\s*/\s*\d)"
FORMULA = r"\\[dt]?frac|\\sqrt|\d\s*(?:[-−+*/^×÷·=x]|\\times|\\div|\\cdot)\s*[\d(.$\\]"


def gsm8k_number(text):
    """The answer that a worked solution ends in, a Decimal: the first number in the last `####` line or
    \\boxed{}, else the last number of all; None without one, or for a formula there: nothing is evaluated."""
    text = re.sub(r"\{,\}|\\,", ",", text)  # LaTeX's thousands commas
    marked = re.findall(r"####([^\n]*)|\\boxed\s*{((?:[^{}]|{[^{}]*})*)}", text)
    answer = "".join(marked[-1]) if marked else ""
    if re.search(FORMULA, answer):
        return None
    found = re.search(NUMBER, answer)
    if found is None:
        found = ([None] + list(re.finditer(NUMBER, text)))[-1]
    if found is None:
        return None
    return Decimal(re.sub(r"[$,]", "", found[0]).replace("−", "-"))


def gsm8k_checker(prompts, completions, rows):
    """1.0 where the completion's number is that of the column `answer` (Cobbe et al. 2021), else 0.0."""
    answers = [gsm8k_number(row["answer"]) for row in rows]
    return [float(a is not None and gsm8k_number(c) == a) for c, a in zip(completions, answers)]


CHECKERS = {TASK: task_checker, "gsm8k": gsm8k_checker}  # they read the column `answer` of the data set


def load_checker(reward, examples):
    """--reward -> function(prompts, completions, rows) -> list[float | None]; None if it names a model."""
    if reward is None:
        fail(f"--reward is missing: a reward model, {', '.join(CHECKERS)}, or path/file.py:function")
    if reward in CHECKERS:
        for example in examples:
            answer = example["row"].get("answer")
            rows = [{"answer": answer, "finished": True}]
            if not isinstance(answer, str) or CHECKERS[reward]([""], [answer], rows) != [1.0]:
                fail(f"{example['where']}: --reward {reward} finds no answer in column `answer`: {answer!r:.60}")
        return CHECKERS[reward]
    path, _, name = reward.rpartition(":")
    if reward.endswith(".py"):
        fail(f"--reward {reward}: say which function of it, {reward}:function")
    if not path.endswith(".py"):
        return None
    if not Path(path).is_file():
        fail(f"--reward {reward}: there is no file {path}")
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # (dataclasses in that file look themselves up)
    spec.loader.exec_module(module)
    if not callable(getattr(module, name, None)):
        fail(f"--reward {reward}: {path} has no function {name}")
    return getattr(module, name)


class Checker:
    """A checker as a reward: examples and completions (lists of ids) -> scores (B,) float32 on the CPU, NaN
    where it returns None, which means that it cannot judge. Only the first process calls it."""

    def __init__(self, function, tokenizer, eos_ids):
        self.function = function
        self.tokenizer = tokenizer
        self.eos_ids = eos_ids

    def __call__(self, examples, completions):
        pairs = list(zip(examples, completions))
        prompts = [example["prompt"] for example in examples]
        texts = [completion_text(self.tokenizer, example["prompt_ids"], ids) for example, ids in pairs]
        rows = [example["row"] | {"finished": ids[-1] in self.eos_ids} for example, ids in pairs]
        scores = on_first_rank(lambda: self.function(prompts, texts, rows))
        if not isinstance(scores, (list, tuple)) or len(scores) != len(texts):
            fail(f"the reward returned {scores!r:.80}; wanted a list of {len(texts)}, one for each completion")
        for text, score in zip(texts, scores):
            if score is not None and not (isinstance(score, numbers.Real) and math.isfinite(score)):
                fail(f"the reward returned {score!r} for {text!r:.60}; return None where it cannot judge")
        return torch.tensor([math.nan if score is None else float(score) for score in scores])


def same_ids(tokenizer, other):
    """True if every token has the same id in the other tokenizer (which may have more: a PAD of its own)."""
    return tokenizer.get_vocab().items() <= other.get_vocab().items()


@as_forward
def last_token_scores(model, batch):
    """The scalar head at the last real token, (b, t) -> (b,), as in reward_model.py: transformers pools at the
    last id that is not PAD, which misreads a sampled PAD. Any other head is read by the model's own forward."""
    ids = {"input_ids": batch["inputs"], "attention_mask": batch["attention_mask"]}
    if not has_score_head(model):
        return model(**ids).logits[:, 0].float()
    hidden = model.base_model(**ids, use_cache=False).last_hidden_state
    last = batch["attention_mask"].sum(1) - 1
    return hidden[torch.arange(len(last), device=last.device), last].float() @ model.score.weight[0].float()


class RewardModel:
    """--reward as a model: examples and completions (lists of ids) -> scores (B,) float32 on the CPU. One with
    another tokenizer gets the text, or messages through its own chat template."""

    def __init__(self, args, policy_tokenizer, eos_ids, device, autocast):
        self.path = args.reward
        self.budget = args.micro_batch_tokens
        self.autocast = autocast
        self.policy_tokenizer = policy_tokenizer
        self.eos_ids = eos_ids
        self.tokenizer = load_tokenizer(args.reward, "--reward")
        self.end_id = end_of_turn_id(self.tokenizer)
        self.control_tokens = control_tokens(self.tokenizer)
        self.same_ids = same_ids(policy_tokenizer, self.tokenizer)
        self.model = load_scorer(args.reward, device, "--reward")
        self.can_give_values = self.same_ids and has_score_head(self.model)

    def __call__(self, examples, completions):
        translate = self.join if self.same_ids else self.translate
        sequences = [translate(example, ids) for example, ids in zip(examples, completions)]
        pad_id = self.tokenizer.pad_token_id or 0  # (a model's own forward may look for it)
        batch = {
            "inputs": pad_rows(sequences, self.model.device, pad_id),
            "attention_mask": pad_rows([[1] * len(ids) for ids in sequences], self.model.device),
        }
        with self.autocast():
            (scores,) = in_micro_batches(lambda mb: (last_token_scores(self.model, mb),), batch, self.budget)
        if not scores.isfinite().all():
            fail(f"--reward {self.path} gave a score that is not finite")
        return scores.cpu()

    def join(self, example, completion_ids):
        return example["prompt_ids"] + completion_ids

    def translate(self, example, completion_ids):
        """Prompt and completion in this model's own tokens. Control tokens that a text spells are content, not
        control: a space breaks them."""
        prompt = example["prompt"]
        text = self.defuse(completion_text(self.policy_tokenizer, example["prompt_ids"], completion_ids))
        is_chat = isinstance(prompt, list)
        if is_chat:
            prompt = [message | {"content": self.defuse(message["content"])} for message in prompt]
            whole = render(self.tokenizer, join_messages(prompt, text))
        else:
            whole = prompt + text
        ids = self.tokenizer(whole, add_special_tokens=not is_chat, verbose=False).input_ids
        ids = end_once(self.tokenizer, ids, self.end_id, is_chat)
        if completion_ids[-1] not in self.eos_ids and ids[-1] == self.end_id:
            ids = ids[:-1]  # a completion that was cut has no end
        if len(ids) > self.tokenizer.model_max_length:
            fail(f"--reward {self.path}: {len(ids)} tokens are too long for it")
        return ids

    def defuse(self, text):
        for token in self.control_tokens:
            text = text.replace(token, f"{token[:1]} {token[1:]}")
        return text


def load_reward(args, examples, tokenizer, eos_ids, *, device, autocast):
    """--reward -> score(examples, completions) -> (B,) float32 on the CPU, NaN where it cannot judge."""
    checker = load_checker(args.reward, examples)
    if checker is not None:
        return Checker(checker, tokenizer, eos_ids)
    return RewardModel(args, tokenizer, eos_ids, device, autocast)


def load_gold(args, tokenizer, eos_ids):
    """The exact checker of --dataset or --reward, to be logged beside the score; None if there is none."""
    checker = CHECKERS.get(args.dataset) or CHECKERS.get(getattr(args, "reward", None))
    return Checker(checker, tokenizer, eos_ids) if checker else None


# ---------------------------------------------------------------- 9. runs
def make_optimizer(models, args, eps=1e-8):
    """AdamW on float32 weights; weight decay on matrices only."""
    parameters = [p for p in models.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": args.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=args.learning_rate, eps=eps, fused=True)


def set_learning_rate(optimizer, args, step, steps):
    """Linear warm-up, then --lr-schedule, which would reach 0 one step after the last: of the step alone."""
    done = max(0, step - args.warmup_steps) / max(1, steps - args.warmup_steps)
    decay = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}
    warmup = min(1.0, (step + 1) / (args.warmup_steps + 1))
    learning_rate = args.learning_rate * decay[args.lr_schedule] * warmup
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    return learning_rate


def is_due(every, step, steps):
    """True after every `every`-th step (0: none of them) and after the last."""
    return step == steps or (every > 0 and step % every == 0)


def check_finite(step, **quantities):
    """Stop before the update is made if one of these is not finite."""
    for name, value in quantities.items():
        if not math.isfinite(value):
            fail(f"step {step}: {name} is {float(value)}, and that update was not made; a lower --learning-rate?")


def replace_file(path, write):
    """Write a file whole or not at all: under another name, flushed, then renamed."""
    new = path.with_name(path.name + ".new")
    with open(new, "wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(new, path)


def one_line(text, width):
    """`text` in at most `width` characters, control characters as Python writes them: for a terminal."""
    return textwrap.shorten(repr(text)[1:-1], width, placeholder="…") if text.strip() else repr(text)


class Run:
    """A run's folder (args.json, metrics, samples, checkpoint/, at last the model) and its terminal.

    Only the first process writes. Random numbers and the position in the data are functions of seed and step,
    so that a checkpoint is the step, the models and the optimiser."""

    def __init__(self, args, models, optimizer, steps):
        self.args = args
        self.models = nn.ModuleDict(models)
        self.optimizer = optimizer
        self.steps = steps
        self.dir = Path(args.output_dir)
        self.signal = None
        self.started = time.time()
        on_first_rank(self.make_folder)
        self.bar = tqdm(total=steps, disable=rank() > 0 or not sys.stderr.isatty(), dynamic_ncols=True)
        self.handlers = {number: signal.signal(number, self.interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
        self.tracker = None
        if args.track == "wandb" and rank() == 0:
            import wandb

            self.tracker = wandb.init(project="onefile-rlhf", dir=self.dir, config=dataclasses.asdict(args))
        if args.track == "tensorboard" and rank() == 0:
            from torch.utils.tensorboard import SummaryWriter

            self.tracker = SummaryWriter(self.dir)

    def make_folder(self):
        if (self.dir / "args.json").exists() and not self.args.resume:  # --overwrite, else setup had stopped
            names = [f"{self.dir.name}.old{number}" for number in ("", *range(2, 10_000))]
            old = next(p for p in map(self.dir.with_name, names) if not p.exists())
            self.dir.rename(old)
            print(f"{self.dir} held an earlier run; it is now {old}")
        self.dir.mkdir(parents=True, exist_ok=True)
        text = json.dumps(dataclasses.asdict(self.args) | {"resume": False}, indent=1) + "\n"
        replace_file(self.dir / "args.json", lambda file: file.write(text.encode()))

    # ------------------------------------------------ checkpoints
    def checkpoint(self, step):
        """Write what --resume needs, whole or not at all. All processes call it."""
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        state = {
            "step": step,
            "models": get_model_state_dict(self.models, options=options),
            "optimizer": get_optimizer_state_dict(self.models, self.optimizer, options=options),
        }
        if rank() == 0:
            (self.dir / "checkpoint").mkdir(exist_ok=True)
            replace_file(self.dir / "checkpoint" / "state.pt", lambda file: torch.save(state, file))
        if world_size() > 1:
            distributed.barrier()

    def restore(self):
        """With --resume read models and optimiser and cut the logs back to the checkpoint -> steps done, 0
        without a checkpoint."""
        if not self.args.resume:
            return 0
        path = self.dir / "checkpoint" / "state.pt"
        step = -1  # without a checkpoint the run begins again, and so do its logs
        if path.exists():
            state = torch.load(path, map_location="cpu", weights_only=True)
            options = StateDictOptions(full_state_dict=True)
            set_model_state_dict(self.models, state["models"], options=options)
            set_optimizer_state_dict(self.models, self.optimizer, state["optimizer"], options=options)
            step = state["step"]
        for name in ("metrics.jsonl", "samples.jsonl"):
            rows = on_first_rank(lambda name=name: read_rows(self.dir / name))
            self.rewrite(name, [row for row in rows if row["step"] <= step])
        print(f"resumed after step {max(0, step)} of {self.steps}")
        self.bar.update(max(0, step))
        return max(0, step)

    def checkpoint_if_due(self, step, is_last=False):
        """After every --save-every-th step, after the last, and before Ctrl-C or SIGTERM ends the run."""
        is_interrupted = self.is_interrupted()
        if is_interrupted or is_last or is_due(self.args.save_every, step, self.steps):
            self.checkpoint(step)
        if is_interrupted and step < self.steps:
            self.exit(f"step {step} of {self.steps}")

    # ------------------------------------------------ signals
    def interrupt(self, number, frame):
        """The first Ctrl-C or SIGTERM: finish the step, save, exit. The second one stops at once."""
        for each in self.handlers:  # (torchrun sends its own after Ctrl-C, and kills what is left in 30 s)
            signal.signal(each, signal.SIG_DFL if world_size() == 1 else signal.SIG_IGN)
        self.signal = number
        if rank() == 0:
            os.write(2, f"\n{signal.Signals(number).name}: stopping after this step\n".encode())

    def is_interrupted(self):
        """True in all processes if a signal came to one of them."""
        self.signal = all_reduce(self.signal or 0, op="max") or None
        return self.signal is not None

    def exit(self, done):
        """End the process with the status that shells expect after a signal; `done` says how far it came."""
        self.close()
        print(f"stopped after {done}; go on with --resume --output-dir {self.dir}", flush=True)
        raise SystemExit(128 + self.signal)

    def close(self):
        self.bar.close()
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
        if rank() == 0:
            replace_file(self.dir / name, lambda file: file.write(json_lines(rows).encode()))

    def log(self, step, metrics, show=()):
        """A line of metrics.jsonl; those named in `show` also go to the progress bar or, in a log, a line."""
        metrics = {name: float(value) for name, value in metrics.items()}
        if torch.cuda.is_available():
            metrics["peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
        self.append("metrics.jsonl", [{"step": step} | metrics])
        if self.args.track == "wandb" and self.tracker:
            self.tracker.log(metrics, step=step)
        if self.args.track == "tensorboard" and self.tracker:
            for name, value in metrics.items():
                self.tracker.add_scalar(name, value, step)
        shown = "  ".join(f"{name} {metrics[name]:.3g}" for name in show if name in metrics)
        self.bar.update(step - self.bar.n)
        self.bar.set_postfix_str(shown)
        if self.bar.disable and shown and is_due(self.args.log_every, step, self.steps):
            print(f"step {step}/{self.steps}  {shown}  {time.time() - self.started:.0f} s", flush=True)
        held_out = [f"{name.removeprefix('eval/')} {v:.3f}" for name, v in metrics.items() if "eval/" in name]
        if held_out and rank() == 0:
            tqdm.write(f"step {step}/{self.steps}  held out: {'  '.join(held_out)}")

    def log_samples(self, step, rows):
        """Rows of prompt, completion and numbers go to samples.jsonl; the first three are shown."""
        self.append("samples.jsonl", [{"step": step} | row for row in rows])
        for row in rows[:3] if rank() == 0 else []:
            prompt = row["prompt"] if isinstance(row["prompt"], str) else row["prompt"][-1]["content"]
            found = "  ".join(f"{name} {value:.2f}" for name, value in row.items() if isinstance(value, float))
            tqdm.write(f"  {one_line(prompt, 30)} | {one_line(row['completion'], 60)} | {found}")

    def finish(self, model, tokenizer, eos_ids, then):
        """Save model and tokenizer for from_pretrained, with all EOS ids, and say what to run next."""
        if model.can_generate():
            # nothing else of the checkpoint: its top-k and top-p were not trained with, and may not even save
            model.generation_config = transformers.GenerationConfig(
                bos_token_id=tokenizer.bos_token_id,
                pad_token_id=tokenizer.pad_token_id,
                eos_token_id=eos_ids if len(eos_ids) > 1 else eos_ids[0],
            )
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        weights = get_model_state_dict(model, options=options) if isinstance(model, FSDPModule) else None
        if rank() == 0:
            model.save_pretrained(self.dir, state_dict=weights)
            tokenizer.save_pretrained(self.dir)
        if world_size() > 1:
            distributed.barrier()
            atexit.register(distributed.destroy_process_group)  # (after a failure it could wait for others)
        self.close()
        if self.tracker is not None:
            self.tracker.finish() if self.args.track == "wandb" else self.tracker.close()
        print(f"{time.time() - self.started:.0f} s; the model is in {self.dir}; next: {then}")


def json_lines(rows):
    """Rows as JSON lines; a number that is not finite, which JSON does not have, as null."""
    text = ""
    for row in rows:
        row = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        text += json.dumps(row, default=str) + "\n"
    return text


def read_rows(path):
    """Rows of a .jsonl log of ours; a last line that was cut off when the run was killed is left out."""
    if not path.exists():
        return []
    lines = path.read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]
