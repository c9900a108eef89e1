"""Everything that is not the algorithm: models, tokens and data, sampling, rewards, and runs on disk.

It knows nothing of any method: log-probs, advantages, losses and update loops stand in the scripts. In this
order: 1. command line   2. processes   3. models   4. the built-in task   5. data   6. batches
7. sampling   8. rewards   9. runs"""

import atexit
import contextlib
import dataclasses
import functools
import hashlib
import importlib.util
import io
import json
import math
import numbers
import os
import random
import re
import shutil
import signal
import sys
import textwrap
import time
import traceback
import zlib
from collections import Counter
from decimal import Decimal
from pathlib import Path

import tokenizers
import torch
import transformers
import tyro
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import distributed, nn
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()


# ---------------------------------------------------------------- 1. command line
def stop(message, status=2):
    """End the program with one sentence on stderr. Status 2: usage or data, 1: a run that failed."""
    if rank() > 0:  # the first one fails likewise, and torchrun then ends this one; else this one says it
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(5)
        message = f"{message} (process {rank()})"
    print(f"error: {escaped(message)}", file=sys.stderr, flush=True)
    raise SystemExit(status)


HELP_GROUPS = {"--model": "model and data", "--output-dir": "the run", "--learning-rate": "optimiser"}
HELP_GROUPS |= {"--micro-batch-tokens": "memory and precision", "--eval-every": "evaluating, saving, logging"}
HELP_GROUPS |= {"--shard": "several processes", "--batch-size": "the method", "--reward": "the method"}


def show_help(Args, laptop):
    """--help: the script's docstring, then its flags in groups, each of which begins with a flag above."""
    width = min(110, shutil.get_terminal_size().columns)
    os.environ["COLUMNS"] = str(width)
    flags = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in laptop.items())
    flags = flags.replace(" True", "")
    parts = sys.modules[Args.__module__].__doc__.split("\n\n")
    parts += [f"Defaults below are those with --model. Without it, the laptop run: {flags}"]
    fill = functools.partial(textwrap.fill, width=width, break_on_hyphens=False)
    print("\n\n".join(part if part.startswith(" ") else fill(part) for part in parts))
    with contextlib.redirect_stdout(io.StringIO()) as text, contextlib.suppress(SystemExit):
        tyro.cli(Args, args=["--help"], description=" ")
    groups = dict(HELP_GROUPS)
    for line in text.getvalue().splitlines():
        if name := groups.pop((line.split() or [""])[0], None) if line.startswith("  --") else None:
            groups = {flag: other for flag, other in groups.items() if other != name}
            print(f"\n{name}")
        if line.startswith("   ") or line.startswith("  --"):
            print(line.rstrip())
    raise SystemExit(0)


def cli(Args, laptop):
    """Command line -> Args. Without --model it is the laptop run: `laptop` replaces defaults, flags win."""
    argv = sys.argv[1:]
    if {"-h", "--help"} & set(argv):
        show_help(Args, laptop)
    real = any(flag == "--model" or flag.startswith("--model=") for flag in argv)
    args = tyro.cli(Args, default=Args() if real else Args(**laptop))
    if not real and (args.dataset != TASK or args.eval_dataset not in (None, TASK)):
        stop("--dataset of your own needs --model: the laptop run's model reads only the built-in task")
    for flag, script in {"model": "sft.py", "reward": "reward_model.py"}.items():
        path = getattr(args, flag, None)
        made = path == laptop.get(flag, TASK) != TASK  # by an earlier stage of the laptop run
        if not real and made and not Path(path, "config.json").is_file():
            stop(f"{path} is not there: run `python {script}` first")
    return args


# a flag that is a whole number is at least 1, any other number at least 0, apart from these
MAY_BE_0, ANY_NUMBER = {"warmup_steps", "eval_every", "save_every"}, {"seed", "min_score", "simpo_margin"}
# what --resume may change: how far the run goes, how it reports, what does not change results, and the size
# of updates from here on, as the way out of a loss that is not finite
MAY_CHANGE = """resume overwrite output_dir steps epochs iterations eval_every save_every log_every track
    shard micro_batch_tokens gradient_checkpointing learning_rate max_grad_norm""".split()


def setup(args):
    """Check flags and folder before anything loads, choose the device -> (device, autocast)."""
    device, folder = start_processes(args.shard), Path(args.output_dir)
    flags = {name: "--" + name.replace("_", "-") for name in vars(args)}
    if not getattr(args, "temperature", 1.0) > 0:
        stop(f"--temperature is {args.temperature}; it must be above 0 (evaluation has its own greedy pass)")
    for field in dataclasses.fields(args):
        name, value = field.name, getattr(args, field.name)
        low = int(field.type in (int, int | None) and name not in MAY_BE_0)
        if isinstance(value, (int, float)) and name not in ANY_NUMBER and not value >= low:
            stop(f"{flags[name]} is {value}; it must be at least {low}")
    if "minibatches" in vars(args) and args.minibatches > args.prompts_per_step * args.num_generations:
        number = args.prompts_per_step * args.num_generations
        stop(f"--minibatches is {args.minibatches}, more than the {number} completions of a step")
    if max(getattr(args, "gamma", 0), getattr(args, "lam", 0)) > 1:
        stop(f"--gamma is {args.gamma} and --lam {args.lam}; neither may be above 1")
    if args.track != "none" and importlib.util.find_spec(args.track) is None:
        stop(f"--track {args.track} needs a package that is not installed: run `pip install {args.track}`")
    for name in ("model", "reward", "value_model"):
        path = getattr(args, name, None)
        if path and Path(path).resolve() == folder.resolve():
            stop(f"--output-dir is {flags[name]}, {path}: it would be overwritten; name another")
    began = folder / "args.json"
    if args.resume:
        if find_checkpoint(folder) is None or not began.is_file():
            stop(f"--resume: there is no checkpoint in {folder}; start without --resume")
        before, now = json.loads(began.read_text()), dataclasses.asdict(args)
        if before.keys() != now.keys():
            stop(f"--resume: {folder} holds a run of another script, or of another version of it")
        for name, value in now.items():  # (rejection_sampling.py counts its iterations' steps by --epochs)
            is_fixed = name not in MAY_CHANGE or name == "epochs" and "iterations" in now
            if is_fixed and before[name] != value:
                stop(f"--resume: {flags[name]} was {before[name]} at first, now {value}; give it as it was")
    elif began.exists() and not args.overwrite:
        stop(f"{folder} holds a run: go on with --resume, or set it aside with --overwrite")
    sys.excepthook, is_cuda = explain, device.type == "cuda"
    args.micro_batch_tokens = args.micro_batch_tokens or (16_384 if is_cuda else 4096)
    dtype = {"auto": "bfloat16" if is_cuda else "float32"}.get(args.dtype, args.dtype)
    name = torch.cuda.get_device_name() if is_cuda else f"{torch.get_num_threads()} CPU threads"
    if world() > 1:
        name = f"{world()} processes, each {name}"
        distributed.barrier()  # none of them has written yet what another one looks for
    print(f"device: {name}; weights float32, compute {dtype}")
    # no cache: it would keep bfloat16 copies of all weights, of which a forward reads each but once
    options = dict(dtype=torch.bfloat16, enabled=dtype == "bfloat16", cache_enabled=False)
    return device, lambda: torch.autocast(device.type, **options)


def explain(kind, error, trace):
    """Uncaught: out of memory says in what, and which flag lowers it; anything else is a traceback."""
    lost = ("Connection closed by peer", "Connection reset by peer", "NCCL", "gloo")
    if world() > 1 and isinstance(error, RuntimeError) and any(words in str(error) for words in lost):
        time.sleep(5)  # whoever failed says why first
        found = f"process {rank()} lost the others, and if one of them has failed that stands above"
        print(f"{found} ({one_line(str(error), 400)})", file=sys.stderr)
    elif isinstance(error, torch.OutOfMemoryError):
        names = {frame.name for frame in traceback.extract_tb(trace)}
        todo = "training: --resume with a lower --micro-batch-tokens, or --gradient-checkpointing"
        if "score" in names:
            todo = "scoring: --resume with a lower --micro-batch-tokens"
        elif {"_sample_wave", "gathered"} & names:
            todo = "sampling: start again with a lower --max-completion-length or --num-generations"
        print(f"error: out of GPU memory in {todo}; a checkpoint, if any, is intact", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


def generator(seed, purpose, step=0):
    """A torch.Generator that its arguments determine: a resumed run has no generator state to restore."""
    digest = hashlib.sha256(f"{seed}/{purpose}/{step}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


# ---------------------------------------------------------------- 2. processes
SHARD = "auto"  # --shard, for whatever model is loaded


def rank():
    """This process among those that torchrun started; 0 with one."""
    if distributed.is_initialized():
        return distributed.get_rank()
    return int(os.environ["RANK"]) if "TORCHELASTIC_RUN_ID" in os.environ else 0  # (they have not joined yet)


def world():
    """The number of processes, W."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def start_processes(shard):
    """Join the processes that torchrun has started, if it has -> this one's device. Only the first prints."""
    global SHARD
    SHARD, kind = shard, "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(kind)
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return device
    if kind == "cuda":
        device = torch.device(kind, int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    if not distributed.is_initialized():
        distributed.init_process_group("cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo")
        if rank() > 0:
            sys.stdout = open(os.devnull, "w")
    return device


def over_ranks(*values, op="sum"):
    """Sums (or "max") over all processes of numbers and tensors, the same in each; with one the values."""
    if world() > 1:
        how = {"sum": distributed.ReduceOp.SUM, "max": distributed.ReduceOp.MAX}[op]
        totals = [torch.as_tensor(x).clone() for x in values]
        for total in totals:
            distributed.all_reduce(total, how)
        values = [t if isinstance(x, torch.Tensor) else t.item() for t, x in zip(totals, values)]
    return values[0] if len(values) == 1 else list(values)


def on_first_rank(function):
    """What function() gives in the first process, in all of them; the others do not call it."""
    result = [function() if rank() == 0 else None]
    if world() > 1:
        distributed.broadcast_object_list(result)
    return result[0]


def shard(model, device, train):
    """Parameters, gradients and optimiser state split over the processes, layer by layer (FSDP2), if --shard
    says so: "auto" where, with float32 weights (and gradients and Adam's two moments), a model takes more
    than a quarter of a GPU's memory. What is not split stands whole in each process."""
    is_split = SHARD == "full"
    if SHARD == "auto" and device.type == "cuda":
        size = (16 if train is not None else 4) * sum(p.numel() for p in model.parameters())
        is_large = 4 * size > torch.cuda.get_device_properties(device).total_memory
        is_split = over_ranks(int(is_large), op="max")  # in all processes or in none
    if world() == 1 or not is_split:
        return model.to(device)
    mesh, blocks = distributed.init_device_mesh(device.type, (world(),)), set(model._no_split_modules or ())
    for module in [m for m in model.modules() if type(m).__name__ in blocks] + [model]:
        # the root, too, gives its parameters back after the forward: what reads them finds them split
        fully_shard(module, mesh=mesh, reshard_after_forward=True)
        # a sum, not a mean, over processes: a loss's weights carry the count of the whole batch
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    model.run = lambda function, *args: function(model, *args)
    register_fsdp_forward_method(model, "run")
    return model


def as_forward(function):
    """function(model, ...) as the model's own forward: FSDP gathers embedding, last norm and head for it."""

    @functools.wraps(function)
    def run(model, *args):
        return model.run(function, *args) if isinstance(model, FSDPModule) else function(model, *args)

    return run


@contextlib.contextmanager
def gathered(model):
    """The whole of a split model in each process while it samples, -> True, if a GPU has room for it: then no
    process waits for another. Else False: each layer is gathered at each step, which all take together."""
    shards, fits = [m for m in model.modules() if isinstance(m, FSDPModule)], True
    if shards and model.device.type == "cuda":
        free, total = torch.cuda.mem_get_info()
        free += torch.cuda.memory_reserved() - torch.cuda.memory_allocated()  # what the allocator keeps
        # float32 weights, their bfloat16 copy and a quarter of the memory for sample()
        needed = 6 * sum(p.numel() for p in model.parameters()) + total / 4
        fits = not over_ranks(int(needed >= free), op="max")  # for all or for none
    shards = shards if fits else []
    for module in shards:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    yield fits
    for module in shards:
        module.set_reshard_after_forward(True, recurse=False)
        module.reshard()


def clip_gradients(model, max_norm):
    """Sum gradients over processes (FSDP has), cut their norm down to max_norm (0: never) -> norm before."""
    params = [p for p in model.parameters() if p.grad is not None]
    if world() > 1 and not isinstance(model, FSDPModule):
        total = torch.cat([p.grad.flatten() for p in params])
        distributed.all_reduce(total)
        for p, grad in zip(params, total.split([p.numel() for p in params])):
            p.grad.copy_(grad.view_as(p))
    norm = nn.utils.clip_grad_norm_(params, max_norm or float("inf"))
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def whole(x):
    """A split tensor whole on the first process's CPU, elsewhere empty; others as they are. All call it."""
    if not isinstance(x, DTensor):
        return x
    x = x.full_tensor()
    return x.cpu() if rank() == 0 else x.new_empty(0)


def split_like(x, parameter):
    """A whole tensor, split over processes as the parameter is, if it is."""
    if isinstance(parameter, DTensor) and x.shape == parameter.shape:
        where = parameter.device_mesh, parameter.placements
        return distribute_tensor(x.to(parameter.device), *where, src_data_rank=None)
    return x


def whole_weights(model):
    """Name -> whole(tensor), of parameters and saved buffers, tied ones once."""
    kept = model.state_dict().keys()
    named = [*model.named_parameters(), *model.named_buffers()]
    return {name: whole(x.detach()).contiguous() for name, x in named if name in kept}


# ---------------------------------------------------------------- 3. models
CHUNK = 40_000_000  # logits that exist at a time, 160 MB in float32


def _load(cls, flag, path, config=None):
    """cls.from_pretrained, failures as one sentence; with a config a model, float32, safetensors only."""
    options = {} if config is None else dict(config=config, dtype=torch.float32, use_safetensors=True)
    if str(path).startswith((".", "/", "~")) and not Path(path).is_dir():
        stop(f"{flag} {path}: there is no such directory")
    try:
        return cls.from_pretrained(path, **options)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        reason = str(error).strip().partition("\n")[0]
        stop(f"{flag} {path}: not a directory or Hub id that can be loaded ({reason})")


def load_tokenizer(path, flag="--model"):
    """The tokenizer of a directory or Hub id. One without PAD pads with EOS: masks come from lengths."""
    tokenizer = _load(AutoTokenizer, flag, path)
    if tokenizer.eos_token_id is None and flag == "--model":
        stop(f"{flag} {path}: the tokenizer has no EOS token, so nothing could end; set its eos_token")
    if tokenizer.pad_token_id is None and tokenizer.eos_token_id is not None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def end_of_turn_id(tokenizer):
    """The id that ends a completion: what the chat template puts after an assistant's text, else EOS."""
    if tokenizer.chat_template is None:
        return tokenizer.eos_token_id
    probe = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "good-bye"}]
    after = _render(tokenizer, "the model's tokenizer", probe).rpartition("good-bye")[2]
    ids, added = tokenizer(after, add_special_tokens=False).input_ids, tokenizer.added_tokens_decoder
    return next((i for i in ids if i in added and added[i].special), tokenizer.eos_token_id)


def eos_ids(tokenizer, path):
    """All ids that end a completion, sorted: of tokenizer, generation config and chat template."""
    ids = {tokenizer.eos_token_id, end_of_turn_id(tokenizer)}
    if path is not None:
        try:
            configured = transformers.GenerationConfig.from_pretrained(path).eos_token_id
        except OSError:  # a model without a generation config
            configured = _load(AutoConfig, "--model", path).eos_token_id
        ids |= set(configured if isinstance(configured, (list, tuple)) else [configured]) - {None}
    return sorted(ids)


def _load_config(flag, path):
    """Its config, dropout and jitter off: else two forwards differ, and the first update's ratio is not 1."""
    config = _load(AutoConfig, flag, path)
    for part in (config, config.get_text_config()):
        for name, value in part.to_dict().items():
            if ("drop" in name or "jitter" in name) and type(value) in (int, float):
                setattr(part, name, 0.0)
    return config


def load_policy(path, device, train=None):
    """A causal language model, float32 weights. `train`: Args of the run that trains it; None: frozen."""
    config = _load_config("--model", path)
    return _prepare(_load(AutoModelForCausalLM, "--model", path, config), device, train)


def load_scorer(path, device, flag, train=None, new_head=None, pad=None):
    """A sequence-classification model with one output, float32 weights; `train` as in load_policy. new_head:
    what a language model gets for a head, "normal" with std 1/sqrt(H+1) (Stiennon et al. 2020), "zero" to
    give 0; without it a language model is an error. pad: tokenizer and ids of EOS, to choose_pad."""
    config = _load_config(flag, path)
    name = (config.architectures or ["model of unknown architecture"])[0]
    is_scorer = name.endswith("ForSequenceClassification")
    if not is_scorer and new_head is None:
        stop(f"{flag} {path}: a {name}, not a reward model; train one from it with reward_model.py")
    if is_scorer and config.num_labels != 1:
        stop(f"{flag} {path}: a classifier with {config.num_labels} labels; a reward model has one output")
    config.num_labels = 1
    model = _load(AutoModelForSequenceClassification, flag, path, config)
    head = getattr(model, "score", None)
    if train is not None and (not isinstance(head, nn.Linear) or head.bias is not None):
        stop(f"{flag} {path}: {type(model).__name__} has no plain `score` head; use a decoder-only model")
    if not is_scorer:
        draw = torch.randn(model.score.weight.shape, generator=generator(train.seed, "head"))
        std = 1 / math.sqrt(model.score.in_features + 1) if new_head == "normal" else 0.0
        model.score.weight.data.copy_(draw * std)
    if pad is not None:
        choose_pad(pad[0], model, pad[1])
    return _prepare(model, device, train)


def _prepare(model, device, train):
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model.eval().requires_grad_(train is not None)
    if model.get_output_embeddings() is not None:
        _check_head(model)
    if train is not None and train.gradient_checkpointing:
        enable = model.gradient_checkpointing_enable  # its name before transformers 5.23
        getattr(model, "activation_checkpointing_enable", enable)({"use_reentrant": False})
    return shard(model.train(train is not None), device, train)


def head_logits(model, hidden):
    """(N, H) last hidden states -> (N, V) float32 logits, scaled and capped as in the model's own forward."""
    return _scaled(model, model.get_output_embeddings()(hidden).float())


def _scaled(model, logits):
    config = model.config.get_text_config()
    if getattr(config, "logits_scaling", None):  # Granite
        logits = logits / config.logits_scaling
    if getattr(config, "logit_scale", None):  # Cohere
        logits = logits * config.logit_scale
    if getattr(config, "final_logit_softcapping", None):  # Gemma 2 and later
        logits = torch.tanh(logits / config.final_logit_softcapping) * config.final_logit_softcapping
    return logits


def head_rows(model):
    """Of how many tokens all logits may exist at a time."""
    return max(1, CHUNK // model.get_output_embeddings().out_features)


def stream_logprobs(model, hidden, targets, temperature):
    """token_logprobs' log-probs and entropy, head_rows tokens at a time: memory does not grow with N*V.

    hidden (N, H), targets (N,) -> log-probs (N,) and entropy (N,), which has no gradient. With z = logits /
    temperature and p = softmax(z): log p_y = z_y - logsumexp(z), entropy = logsumexp(z) - sum of p z, and
    d log p_y / d z_j = [j = y] - p_j. The backward pass computes logits again and sums the head's gradient in
    one float32 buffer. (torch's linear_cross_entropy does likewise, without entropy, temperature or cap.)"""
    head, kind = model.get_output_embeddings(), hidden.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else head.weight.dtype
    options = targets, model, temperature, head_rows(model), dtype
    with torch.autocast(kind, enabled=False):
        return _Streamed.apply(hidden, head.weight, head.bias, *options)


class _Streamed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, model, temperature, size, dtype):
        w, parts = weight.to(dtype), []
        buffers = hidden.new_empty(2, min(size, len(hidden)), len(weight), dtype=torch.float)
        for h, y in zip(hidden.split(size), targets.split(size)):
            z = _scaled(model, _logits(h.to(dtype), w, bias, buffers[0, : len(h)])).div_(temperature)
            top = z.amax(-1, keepdim=True)
            target = z.sub_(top).gather(1, y[:, None])[:, 0]
            z = z.clamp_(min=-1e30)  # a token of probability 0 counts 0 in the entropy
            p = torch.exp(z, out=buffers[1, : len(h)])
            total = p.sum(-1)
            logprobs, entropy = target - total.log(), total.log()
            parts.append((logprobs, entropy - p.mul_(z).sum(-1) / total, top[:, 0] + total.log()))
        logprobs, entropy, logsumexp = (torch.cat(part) for part in zip(*parts))
        ctx.save_for_backward(hidden, weight, bias, targets, logsumexp)
        ctx.options = model, temperature, size, dtype
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    def backward(ctx, d_logprobs, _):
        hidden, weight, bias, targets, logsumexp = ctx.saved_tensors
        model, temperature, size, dtype = ctx.options
        w, d_hidden, d_weight = weight.to(dtype), torch.empty_like(hidden), torch.zeros_like(weight)
        d_bias = None if bias is None else torch.zeros_like(bias)
        buffer = hidden.new_empty(min(size, len(hidden)), len(weight), dtype=torch.float)
        for start in range(0, len(hidden), size):
            rows = slice(start, start + size)
            h, y, d = hidden[rows].to(dtype), targets[rows, None], d_logprobs[rows, None] / temperature
            logits = _logits(h, w, bias, buffer[: len(h)]).requires_grad_()
            with torch.enable_grad():
                scaled = _scaled(model, logits)
            z = scaled.detach()
            d_z = z.div_(temperature).sub_(logsumexp[rows, None]).exp_().mul_(-d).scatter_add_(1, y, d)
            if scaled is not logits:
                (d_z,) = torch.autograd.grad(scaled, logits, d_z)
            d_bias = None if bias is None else d_bias.add_(d_z.sum(0))
            d_z = d_z.to(dtype)
            d_hidden[rows] = d_z @ w
            if d_weight.dtype == dtype:
                d_weight.addmm_(d_z.T, h)
            else:  # the product in bfloat16, the sum in float32
                d_weight += d_z.T @ h
        return d_hidden, d_weight, d_bias, None, None, None, None, None


def _logits(h, w, bias, out):
    """(n, H), (V, H) -> (n, V) float32, in `out`: on a CPU new memory for each chunk costs as much again."""
    if h.dtype == out.dtype:
        torch.mm(h, w.T, out=out)
    else:
        out.copy_(h @ w.T)
    return out if bias is None else out.add_(bias)


@torch.no_grad()
def _check_head(model):
    """Stop if head_logits is not what the model's own forward gives: an architecture it does not know."""
    if not isinstance(model.get_output_embeddings(), nn.Linear):
        stop(f"{type(model).__name__} has no plain language-model head; stream_logprobs needs an nn.Linear")
    if model.base_model is model:
        stop(f"{type(model).__name__} does not say which part of it is without the head (base_model)")
    ids = torch.arange(1, 5, device=model.device)[None]
    ours = head_logits(model, model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0])
    theirs = model(input_ids=ids, use_cache=False).logits[0].float()
    if not torch.allclose(ours.log_softmax(-1), theirs.log_softmax(-1), atol=1e-3):
        stop(f"{type(model).__name__} changes its logits in a way that head_logits does not know: add it")
    padded, seen = nn.functional.pad(ids, (2, 0)), nn.functional.pad(torch.ones_like(ids), (2, 0))
    inputs = dict(attention_mask=seen, position_ids=(seen.cumsum(1) - 1).clamp(min=0))
    left = model(input_ids=padded, **inputs, use_cache=False).logits[0, 2:]
    if not torch.allclose(left.float().log_softmax(-1), theirs.log_softmax(-1), atol=1e-3):
        stop(f"{type(model).__name__} counts positions in a way of its own: its prompts cannot be padded")


def choose_pad(tokenizer, model, eos):
    """Give a reward model a PAD that is no EOS: transformers scores at the last id that is not PAD."""
    added = tokenizer.added_tokens_decoder.items()
    named = [i for i, token in added if token.special and "pad" in token.content.lower()]
    ids = [i for i in (tokenizer.pad_token_id, *named, tokenizer.unk_token_id) if i not in (None, *eos)]
    if ids:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(ids[0])
    else:
        tokenizer.add_special_tokens({"pad_token": "[PAD]"})
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
    draw, rows = random.Random(f"{'held out' if held_out else seed}/{kind == 'preference'}"), []
    while len(rows) < TASK_ROWS["held out" if held_out else kind]:
        letters = "".join(draw.sample(LETTERS, draw.randint(4, 7)))
        if (zlib.crc32(letters.encode()) % 8 == 0) != held_out:
            continue
        message = {"role": "user", "content": f"Put these letters into alphabetical order: {letters}"}
        row = {"prompt": [message] if chat else f"{letters}>", "answer": "".join(sorted(letters))}
        if kind == "sft":
            row["completion"] = row["answer"]
        if kind == "preference":
            row["chosen"], wrong = row["answer"], row["answer"]
            while wrong == row["answer"]:
                wrong = slip(wrong if draw.random() < 0.7 else slip(wrong, draw), draw)
                wrong = "".join(sorted(wrong)) if draw.random() < 0.6 else wrong
            row["rejected"] = wrong
        rows.append(row)
    return rows


def slip(text, draw):
    """`text` with one slip: a wrong letter, two neighbours swapped, a letter left out, doubled or put in."""
    while True:
        i, letter = draw.randrange(len(text)), draw.choice(LETTERS)
        before, here, after = text[:i], text[i], text[i + 1 :]
        swapped, replaced = before + after[:1] + here + after[1:], before + letter + after
        doubled, put_in = before + here + here + after, before + letter + here + after
        wrong = draw.choice([swapped, replaced, replaced, before + after, doubled, put_in])
        if wrong != text:
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
    special = dict(pad_token="[PAD]", eos_token="[EOS]", unk_token="[UNK]")
    return transformers.PreTrainedTokenizerFast(tokenizer_object=letters, model_max_length=64, **special)


def tiny_policy(tokenizer, device, train):
    """A Llama of 0.8M parameters, random weights, for the laptop run."""
    torch.manual_seed(train.seed)
    shape = dict(hidden_size=128, intermediate_size=512, num_hidden_layers=3, num_attention_heads=4)
    ids = dict(pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, bos_token_id=None)
    config = transformers.LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=64, **shape, **ids)
    return _prepare(transformers.LlamaForCausalLM(config), device, train)


# ---------------------------------------------------------------- 5. data
WANTED = {
    "sft": "`prompt` and `completion`, `messages`, `instruction` and `output`, or `question` and `answer`",
    "preference": "`chosen` and `rejected`, with a `prompt` or beginning alike",
    "prompt": "`prompt`, `instruction`, or `question` and `answer`",
}
ALPACA = (
    "Below is an instruction that describes a task{paired}. Write a response that appropriately completes "
    "the request.\n\n### Instruction:\n{instruction}\n\n{extra}### Response:\n"
)
PAIRED = ", paired with an input that provides further context"
FORMS = {"prompt": "completion", "instruction": "output", "question": "answer"}  # prompt's key: completion's
GSM8K = "{question}\nThink step by step and end with a line that holds #### and then the answer, a number.\n"


def read_rows(dataset, kind, held_out, seed, chat):
    """Rows of a data set: a list of (where, dict), `where` naming file and line."""
    if dataset == TASK:
        rows = enumerate(task_rows(kind, held_out, seed, chat), 1)
    elif dataset.endswith((".jsonl", ".json")):
        rows = _read_file(dataset)
    elif importlib.util.find_spec("datasets") is None:
        stop(f"{dataset} is no .jsonl or .json file; to read it from the Hub, `pip install datasets`")
    else:
        import datasets

        name, _, split = dataset.partition(":")
        try:
            rows = enumerate(datasets.load_dataset(name, split=split or "train"), 1)
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            reason = str(error).strip().partition("\n")[0]
            stop(f"{dataset}: cannot be loaded from the Hub ({reason})")
    unit = "line" if dataset.endswith(".jsonl") else "row"
    rows = [(f"{dataset} {unit} {number}", row) for number, row in rows]
    if not rows:
        stop(f"{dataset}: is empty; a row has {WANTED[kind]}")
    for where, row in rows:
        if not isinstance(row, dict):
            stop(f"{where}: is a {type(row).__name__}, not an object with {WANTED[kind]}")
    return rows


def _read_file(path):
    """Pairs of a number, of the line or (.json) of the row, and what stands there."""
    number, rows, wanted = 1, [], "one JSON object a line"
    try:
        if not Path(path).is_file():  # a pipe or a device would be read without end
            stop(f"{path}: there is no such file")
        text = Path(path).read_text(encoding="utf-8-sig")
        if path.endswith(".json"):
            wanted = "one list of JSON objects"
            rows = json.loads(text) if text.strip() else []
            if not isinstance(rows, list):
                stop(f"{path}: holds one {type(rows).__name__}, not a list of objects")
            return list(enumerate(rows, 1))
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                rows.append((number, json.loads(line)))
        return rows
    except OSError as error:
        stop(f"{path}: cannot be read ({error.strerror})")
    except UnicodeDecodeError as error:
        stop(f"{path}: is not UTF-8 ({error.reason} at byte {error.start}); convert it to UTF-8")
    except (ValueError, RecursionError) as error:  # JSONDecodeError, a number of too many digits
        line = getattr(error, "lineno", 1) + number - 1
        reason = getattr(error, "msg", "nested too deep" if isinstance(error, RecursionError) else error)
        stop(f"{path} line {line}: broken JSON ({reason}); wanted {wanted}")


def _field(row, key, where, kind):
    """A text, or a list of messages, out of a row."""
    if key not in row:
        stop(f"{where}: no `{key}` among the keys {', '.join(row) or '(none)'}; wanted {WANTED[kind]}")
    value = row[key]
    texts = [value] if isinstance(value, str) else []
    for message in value if isinstance(value, list) else []:
        fields = [message.get("role"), message.get("content")] if isinstance(message, dict) else [None]
        if not all(isinstance(field, str) for field in fields):
            stop(f"{where}: `{key}` holds {repr(message)[:60]}, no message with texts `role` and `content`")
        texts += fields
    if not texts:
        stop(f"{where}: `{key}` must be a text or a list of messages, found {repr(value)[:60]}")
    _check_unicode("".join(texts), where, f"`{key}`")
    return value


def _check_unicode(text, where, name):
    if re.search("[\ud800-\udfff]", text):
        stop(f"{where}: {name} holds half of a surrogate pair, which is no text; mend or leave out the row")


def _prompt(row, where, kind, template, chat):
    """The prompt of a row: messages, or a text through --prompt-template (Alpaca's, GSM8K's are built in)."""
    key = next((key for key in FORMS if key in row), "prompt")
    if not isinstance(_field(row, key, where, kind), str):
        if key != "prompt":
            stop(f"{where}: `{key}` must be a text, found a list of messages; messages go into `prompt`")
        if template != "{prompt}":
            stop(f"{where}: --prompt-template is for texts, and `prompt` is a list of messages here")
        return row["prompt"]
    values, extra = row, row.get("input")
    if template == "{prompt}" and key == "instruction":
        if extra is not None and not isinstance(extra, str):
            stop(f"{where}: `input` must be a text, found {repr(extra)[:60]}")
        extra, paired = (f"### Input:\n{extra}\n\n", PAIRED) if extra else ("", "")
        template, values = ALPACA, row | dict(paired=paired, extra=extra)
    elif template == "{prompt}" and key == "question":
        template = GSM8K
    try:
        text = template.format(**values)
    except (LookupError, ValueError, AttributeError, TypeError) as error:
        stop(f"{where}: --prompt-template {template!r} does not fit the keys {', '.join(row)} ({error!r})")
    _check_unicode(text, where, f"--prompt-template {template[:60]!r} with this row")
    return [{"role": "user", "content": text.strip()}] if key == "question" and chat else text


def _shared_prefix(row, where):
    """chosen and rejected -> prompt, which is what they share at the beginning, chosen, rejected: of messages
    all equal ones but the last; of texts up to the last "Assistant:" (Anthropic's form), or white space."""
    chosen, rejected = (_field(row, key, where, "preference") for key in ("chosen", "rejected"))
    if type(chosen) is not type(rejected):
        stop(f"{where}: `chosen` and `rejected` must both be texts or both lists of messages")
    same = [a == b for a, b in zip(chosen, rejected)]
    cut = (same + [False]).index(False)
    if isinstance(chosen, list):
        cut = min(cut, len(chosen) - 1, len(rejected) - 1)
    elif chosen != rejected:
        match = re.match(r"(.*\n\nAssistant:)|(.*)(?=\s)", chosen[:cut], re.DOTALL)
        cut = match.end() if match else 0
    if cut == 0:
        stop(f"{where}: `chosen` and `rejected` do not begin alike; wanted {WANTED['preference']}")
    return chosen[:cut], chosen[cut:], rejected[cut:]


def _render(tokenizer, where, messages, generate=False):
    """Messages -> text by the chat template; with `generate` as far as where the assistant begins."""
    if tokenizer.chat_template is None:
        stop(f"{where}: messages need a chat template; the tokenizer has none (instruct models have one)")
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generate)
    except Exception as error:  # jinja2's errors, and whatever a template raises
        stop(f"{where}: the chat template refuses these messages ({' '.join(str(error).split())})")


def _with_answer(prompt, answer):
    return [*prompt, *([{"role": "assistant", "content": answer}] if isinstance(answer, str) else answer)]


def _turns(row, where, kind, args, chat):
    """A row -> its prompt, and (everything before a trained turn, that turn) for each trained turn."""
    if kind == "sft" and "messages" in row:
        messages = _field(row, "messages", where, kind)
        roles = [m["role"] for m in messages] if isinstance(messages, list) else []
        turns = [i for i, role in enumerate(roles) if i and role == "assistant"]
        if not turns:
            stop(f"{where}: `messages` has no assistant turn after the first message: nothing to train on")
        turns = turns if args.train_on == "all" else turns[-1:]
        return messages[: turns[-1]], [(messages[:i], messages[i : i + 1]) for i in turns]
    twice = isinstance(row.get("chosen"), list) and isinstance(row.get("prompt"), str)  # UltraFeedback's form
    if kind == "preference" and (twice or not FORMS.keys() & row.keys()):
        prompt, *answers = _shared_prefix(row, where)
        return prompt, [(prompt, answer) for answer in answers]
    prompt = _prompt(row, where, kind, args.prompt_template, chat)
    completion = next(FORMS[key] for key in FORMS if key in row)
    keys = {"sft": [completion], "preference": ["chosen", "rejected"], "prompt": []}[kind]
    answers = [_field(row, key, where, kind) for key in keys]
    if any(isinstance(prompt, str) and not isinstance(answer, str) for answer in answers):
        stop(f"{where}: the prompt is a text, so {' and '.join(keys)} must be texts too, not messages")
    return prompt, [(prompt, answer) for answer in answers] or [(prompt, None)]


def encode(tokenizer, texts, is_chat, keep_eos=False):
    """Ids of many texts. A chat template writes BOS itself; to a plain text the tokenizer adds it, once."""
    eos = [] if keep_eos or tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    ids = tokenizer(texts, add_special_tokens=not is_chat, verbose=False).input_ids if texts else []
    own = [eos and i[-1:] == eos and not text.endswith(tokenizer.eos_token) for i, text in zip(ids, texts)]
    return [i[:-1] if strip else i for i, strip in zip(ids, own)]  # (some tokenizers add EOS, to prompts too)


def with_end(tokenizer, ids, end, is_chat, finished=True):
    """Ids that end in `end` or EOS, without what a chat template puts after it; not finished: without it."""
    if is_chat and end in ids:
        return ids[: len(ids) - ids[::-1].index(end) - (not finished)]
    has_none = end is not None and ids[-1:] not in ([end], [tokenizer.eos_token_id])
    return ids + [end] if finished and has_none else ids


def control_tokens(tokenizer):
    """Texts that a tokenizer reads as control: in the content of a message they could end the turn."""
    added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    return sorted((added | set(tokenizer.all_special_tokens)) - {""})


def spaced(text, tokens):
    """Text in which no token of these is spelled any more: a space follows its first letter."""
    for token in tokens:
        text = text.replace(token, f"{token[:1]} {token[1:]}")
    return text


def load_examples(tokenizer, dataset, kind, args, held_out=False):
    """Read, check and tokenise a data set -> list of dicts: prompt (as in the file), row, where, prompt_ids;
    kind "sft": also ids, mask (1 on trained tokens); "preference": also chosen_ids, rejected_ids, margin.

    Prompt and answer are tokenised as one text and split where the prompt's tokens end; an answer ends in one
    EOS, or in the chat template's end of turn. Texts may spell control tokens (people bring rendered
    prompts). A row whose messages do, or that cannot be used whole, is dropped and counted, never cut."""
    chat, end, dropped, kept = tokenizer.chat_template is not None, end_of_turn_id(tokenizer), Counter(), []
    limit, over = getattr(args, "max_length", 0), "--max-length"
    if kind == "prompt":
        room = context_of(_load(AutoConfig, "--model", args.model)) - args.max_completion_length
        room = room, "the model's context less --max-completion-length:"
        limit, over = min((args.max_prompt_length, "--max-prompt-length"), room)
    rows, texts, examples = read_rows(dataset, kind, held_out, args.seed, chat), {True: [], False: []}, []
    control = control_tokens(tokenizer)
    for where, row in rows:
        prompt, turns = _turns(row, where, kind, args, chat)
        margin = 0.0 if kind != "preference" or row.get("margin") is None else row["margin"]
        if type(margin) not in (int, float) or not abs(margin) < 1e9:
            stop(f"{where}: `margin` must be a number, found {str(margin)[:60]}")
        is_chat = isinstance(prompt, list)
        messages = str([_with_answer(*turn) for turn in turns if turn[1] is not None] or prompt)
        if is_chat and any(token in messages for token in control):
            dropped["whose messages spell a control token of the tokenizer"] += 1
            continue
        for before, answer in turns:
            text = whole = _render(tokenizer, where, before, generate=True) if is_chat else before
            if answer is not None:
                whole = _render(tokenizer, where, _with_answer(before, answer)) if is_chat else text + answer
            texts[is_chat] += [text, whole]
        examples.append((dict(prompt=prompt, row=row, where=where, margin=margin), is_chat, len(turns)))
    ids = {is_chat: iter(encode(tokenizer, batch, is_chat)) for is_chat, batch in texts.items()}
    for example, is_chat, count in examples:
        splits = [(next(ids[is_chat]), next(ids[is_chat])) for _ in range(count)]
        prompt_ids, trained = splits[-1][0], [] if kind == "prompt" else splits
        answers = [with_end(tokenizer, whole[len(before) :], end, is_chat) for before, whole in trained]
        spans = [(len(before), before + answer) for (before, _), answer in zip(splits, answers)]
        sequence = spans[-1][1] if spans else prompt_ids
        if any(not before or whole[: len(before)] != before for before, whole in splits):
            dropped["whose prompt is empty or, in tokens, no prefix of prompt and completion"] += 1
        elif len(prompt_ids) + max(map(len, answers), default=0) > limit:
            dropped[f"longer than {over} {limit}"] += 1
        elif kind == "preference" and answers[0] == answers[1]:
            dropped["whose chosen and rejected are the same in tokens"] += 1
        elif kind == "sft" and any(sequence[: len(text)] != text for _, text in spans):  # (--train-on all)
            dropped["whose turns the chat template does not render as prefixes"] += 1
        else:
            kept.append(example | dict(prompt_ids=prompt_ids))
            if kind == "preference":
                kept[-1] |= dict(chosen_ids=answers[0], rejected_ids=answers[1])
            elif kind == "sft":
                kept[-1] |= dict(ids=sequence, mask=[0] * len(sequence))
                for first, text in spans:
                    kept[-1]["mask"][first : len(text)] = [1] * (len(text) - first)
    reasons = "".join(f"; {count} dropped {reason}" for reason, count in dropped.items())
    print(f"{dataset}{' (held out)' if held_out else ''}: {len(kept)} of {len(rows)} rows{reasons}")
    if not kept:
        stop(f"{dataset}: no row is left{reasons}")
    return kept


def load_held_out(tokenizer, kind, args):
    """Examples of --eval-dataset, or the built-in task's own held-out rows; else none, and a line says so."""
    dataset = args.eval_dataset or (TASK if args.dataset == TASK else None)
    if dataset is None:
        print("no --eval-dataset: nothing is held out")
    return load_examples(tokenizer, dataset, kind, args, held_out=True) if dataset else []


def shuffled(examples, seed, first, last):
    """Examples number first to last - 1 of an endless stream, each pass over the data in its own order."""
    n, picked = len(examples), []
    for epoch in range(first // n, (last - 1) // n + 1):
        order = torch.randperm(n, generator=generator(seed, "shuffle", epoch)).tolist()
        picked += [examples[i] for i in order[max(0, first - epoch * n) : last - epoch * n]]
    return picked


def context_of(config):
    """The longest sequence that a model's positions were made for."""
    return getattr(config.get_text_config(), "max_position_embeddings", None) or 10**9


def check_context(model, tokens, flag):
    """Stop if sequences of that many tokens do not fit."""
    context = context_of(model.config)
    if tokens > context:
        stop(f"sequences of {tokens} tokens do not fit a model's context of {context}: lower {flag}")


# ---------------------------------------------------------------- 6. batches
# tokens below which a forward takes as long as a smaller one: on a CPU measured (reward_model.py's laptop run
# is a quarter slower with 0), on a GPU, where kernels take time to launch, an estimate for a 0.5B model
SMALL_BATCH = 4096 if torch.cuda.is_available() else 256


@dataclasses.dataclass
class Batch:
    """Right-padded sequences. Masks come from lengths, so PAD may be any id, EOS too."""

    input_ids: torch.Tensor  # (B, L)
    attention_mask: torch.Tensor  # (B, L) 1 on prompt and completion
    completion_mask: torch.Tensor  # (B, L) 1 on completion tokens, EOS included
    lengths: list  # B ints

    def rows(self, index):
        """Some rows, cut to the longest of them."""
        lengths = [self.lengths[i] for i in index]
        part = index, slice(max(lengths, default=2))
        return Batch(self.input_ids[part], self.attention_mask[part], self.completion_mask[part], lengths)


def pad_batch(sequences, masks, device, pad_id=0):
    """Lists of ids, and of 0/1 of equal lengths -> Batch. Padding is never read: any id will do."""
    lengths, width = [len(ids) for ids in sequences], max([2, *map(len, sequences)])
    input_ids = [ids + [pad_id] * (width - len(ids)) for ids in sequences]
    attention_mask = [[1] * n + [0] * (width - n) for n in lengths]
    completion_mask = [mask + [0] * (width - len(mask)) for mask in masks]
    rows = (input_ids, attention_mask, completion_mask)
    tensors = [torch.tensor(x, dtype=torch.long, device=device).view(-1, width) for x in rows]
    return Batch(*tensors, lengths)


def completion_batch(prompts, completions, device):
    """Lists of prompt ids and of completion ids -> Batch."""
    masks = [[0] * len(p) + [1] * len(c) for p, c in zip(prompts, completions)]
    return pad_batch([p + c for p, c in zip(prompts, completions)], masks, device)


def micro_batches(lengths, budget, rows=None):
    """Rows, in any order -> this process's share, in lists of about one length: with padding at most `budget`
    tokens (or one row), and at most 1/20 of them padding unless the list is small (SMALL_BATCH). With several
    processes each gets every W-th row, longest first, and as many lists as any other, the last ones without
    rows if need be: all go through the model equally often, and a list of no rows adds 0."""

    def cut(order):
        cuts, real = [], 0  # real: tokens of the last list, without its padding
        for i in order:
            tokens = lengths[cuts[-1][0]] * (len(cuts[-1]) + 1) if cuts else math.inf  # with this row, padded
            is_even = 20 * (tokens - real - lengths[i]) <= tokens or tokens <= SMALL_BATCH
            if tokens > budget or not is_even:
                cuts.append([])
                real = 0
            cuts[-1].append(i)
            real += lengths[i]
        return cuts

    order = sorted(range(len(lengths)) if rows is None else rows, key=lambda i: (-lengths[i], i))
    shares = [cut(order[first :: world()]) for first in range(world())]
    mine = shares[rank()]
    return mine + [[]] * (max(map(len, shares)) - len(mine))


@torch.no_grad()
def over_micro_batches(function, batch, budget, autocast):
    """Per-token results of a whole batch, without gradient: function(input_ids, attention_mask, mask) -> (b,
    l-1), or its first columns, or a tuple of such, on each micro-batch -> (B, L-1), or a list of such."""
    results = None
    for rows in micro_batches(batch.lengths, budget):
        mb = batch.rows(rows)
        with autocast():
            values = function(mb.input_ids, mb.attention_mask, mb.completion_mask[:, 1:])
        values = values if isinstance(values, tuple) else (values,)
        results = results or [torch.zeros_like(batch.input_ids[:, 1:], dtype=v.dtype) for v in values]
        for result, value in zip(results, values):
            result[rows, : value.shape[1]] = value
    return over_ranks(*results)


def _full_attention(model, cache):
    """Each token attends to all before it, by keys that depend on nothing after it: what can be computed in
    two parts, with masks of our own. Windowed, linear and shared layers, ALiBi: left to transformers."""
    config = model.config.get_text_config()
    usual = all(type(layer) is transformers.cache_utils.DynamicLayer for layer in cache.layers)
    usual &= config._attn_implementation == "sdpa" and not getattr(config, "alibi", False)
    # these rotary embeddings turn by an angle that depends on the longest row
    return usual and not re.search("longrope|dynamic", str(getattr(config, "rope_parameters", None)))


def backbone(model, input_ids, attention_mask):
    """The last layer's output, (b, l) -> (b, l, H). Without rows it goes through the model all the same, with
    a row that counts for nothing: under FSDP each process gathers layers for all."""
    if len(input_ids) == 0:
        return model.base_model(input_ids.new_zeros(1, 2), use_cache=False).last_hidden_state[:0]
    return model.base_model(input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state


class SharedPrompts(transformers.cache_utils.DynamicLayer):
    """A layer's keys and values of prompts, and which of them each row continues; the rest is not kept."""

    def __init__(self, layer, which):
        super().__init__()
        self.is_initialized, self.keys, self.values, self.which = True, layer.keys, layer.values, which

    def update(self, key_states, value_states, *args, **kwargs):
        pairs = (self.keys, key_states), (self.values, value_states)
        return tuple(torch.cat([x.index_select(0, self.which), new], 2) for x, new in pairs)


def hidden_states(model, input_ids, attention_mask, mask):
    """The last layer's output, (b, l) -> (b, l, H), at the columns of mask (b, l-1); elsewhere anything.

    Rows with the same prompt (a group's completions, a pair's) share it where that spares a fifth of the
    tokens: it goes through the model once, and a second pass, of the completions, reads its keys and values,
    through which its gradient comes back. The same numbers up to rounding."""
    if len(input_ids) == 0 or isinstance(model, FSDPModule):  # (all processes must do alike)
        return backbone(model, input_ids, attention_mask)
    (rows, width), column = input_ids.shape, torch.arange(input_ids.shape[1], device=mask.device)
    last = mask.int().argmax(1, keepdim=True)  # (b, 1) a prompt's last token, the first whose output is read
    more = max(0, int(((mask * column[1:]).amax(1, keepdim=True) - last - 1).max()))  # columns after it
    ids = input_ids[:, : int(last.max()) + 1]
    prompts, which = ids.masked_fill(column[: ids.shape[1]] > last, -1).unique(dim=0, return_inverse=True)
    is_worth = 5 * (prompts.numel() + rows * more) <= 4 * rows * width and rows * width > SMALL_BATCH
    cache = transformers.DynamicCache(config=model.config)  # (gradient checkpointing would drop it)
    is_worth &= not any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    if not (is_worth and more and _full_attention(model, cache)):
        return backbone(model, input_ids, attention_mask)

    is_real = prompts >= 0
    inputs = dict(attention_mask=is_real.long(), past_key_values=cache, use_cache=True)
    of_prompts = model.base_model(prompts.clamp(min=0), **inputs).last_hidden_state
    cache.layers = [SharedPrompts(layer, which) for layer in cache.layers]
    position = (last + 1 + column[:more]).clamp(max=width - 1)  # (b, more)
    causal = (column[:more] <= column[:more, None]).expand(rows, -1, -1)
    seen = torch.cat([is_real[which][:, None].expand(-1, more, -1), causal], 2)[:, None]
    inputs |= dict(attention_mask=seen, position_ids=position)
    of_rest = model.base_model(input_ids.gather(1, position), **inputs).last_hidden_state  # (b, more, H)
    row = torch.arange(rows, device=mask.device)[:, None]
    after = prompts.numel() + row * more + (column - last - 1).clamp(max=more - 1)
    index = torch.where(column <= last, which[:, None] * prompts.shape[1] + column, after)
    both = torch.cat([of_prompts.flatten(0, 1), of_rest.flatten(0, 1)])
    return both.index_select(0, index.flatten()).view(rows, width, -1)


# ---------------------------------------------------------------- 7. sampling
CHECK_EVERY = {"cpu": 1, "cuda": 16}  # steps between two questions which rows have ended
say_once = functools.cache(print)


def sample(model, prompts, repeats, max_new_tokens, temperature, stop_ids, seed, memory=None, plain=False):
    """Sample from all of softmax(logits / temperature): no top-k, no top-p, no settings of the checkpoint.

    prompts: P lists of ids -> (completions, logprobs), each B = P * repeats lists, a prompt's side by side.
    A completion ends with its EOS, or after max_new_tokens. temperature 0: greedy (log-probs at 1). Ids
    that a model has and its tokenizer lacks can be drawn too, and PAD. seed: a torch.Generator. Noise belongs
    to row and step (one uniform each, inverse CDF), so that neither dropping finished rows, nor waves, nor
    the kind of cache changes a token.

    memory: bytes for keys, values, logits and the prefill (default: a quarter of a GPU's, 4 GiB on a CPU);
    what does not fit goes in waves of prompts of about one length. plain: transformers' growing cache in any
    case. With several processes each samples every W-th prompt, and all get all completions."""
    noise = torch.rand(len(prompts) * repeats, max_new_tokens, generator=seed, dtype=torch.float64)
    if memory is None:
        memory = 2**32 if model.device.type != "cuda" else torch.cuda.mem_get_info(model.device)[1] // 4
    config, longest = model.config.get_text_config(), max(map(len, prompts))
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
    kept = 2 * config.num_hidden_layers * width * (longest + max_new_tokens)  # keys and values of a row
    prefill = 16 * config.hidden_size * longest / repeats
    size = int(min(memory / (4 * (kept + prefill) + 32 * config.vocab_size), 512))  # more rows gain little
    size = max(1, size // repeats)
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    results, mine = {}, order[rank() :: world()]
    was_training, was_enabled = model.training, torch.is_autocast_cache_enabled()
    model.eval()  # in train mode gradient checkpointing would drop the cache
    with gathered(model) as alone:
        torch.set_autocast_cache_enabled(alone)  # one bfloat16 copy of the weights for all steps
        # layer by layer all processes take as many waves, those that have no rows left with one of no use
        last = len(mine) if alone else max(over_ranks(-(-len(mine) // size), op="max") * size, 1)
        for first in range(0, last, size):
            part = mine[first : first + size] or order[:1]
            rows = [i * repeats + g for i in part for g in range(repeats)]
            wave = [prompts[i] for i in part], temperature, stop_ids, noise[rows].to(model.device), plain
            results |= zip(rows, _sample_wave(model, *wave, alone))
    torch.clear_autocast_cache()
    torch.set_autocast_cache_enabled(was_enabled)
    model.train(was_training)
    if world() > 1:
        parts = [None] * world()
        distributed.all_gather_object(parts, results)
        results = {i: row for part in parts for i, row in part.items()}
    rows = [results[i] for i in range(len(noise))]
    return [tokens for tokens, _ in rows], [logps for _, logps in rows]


class PreallocatedLayer(transformers.cache_utils.DynamicLayer):
    """Keys and values of one layer in storage for the whole wave, (B, heads, T, D): a step writes one column
    and reads a view of those before it, where the growing cache copies them all."""

    def __init__(self, prefilled, repeats, max_new_tokens, dtype):
        super().__init__()
        self.is_initialized, self.stored = True, []
        for x in (prefilled.keys, prefilled.values):
            rows, heads, width, size = x.shape
            new = x.new_empty(rows * repeats, heads, width + max_new_tokens, size, dtype=dtype)
            new.view(rows, repeats, *new.shape[1:])[:, :, :, :width] = x[:, None]
            self.stored.append(new)
        self.keys, self.values = (x[:, :, :width] for x in self.stored)

    def update(self, key_states, value_states, *args, **kwargs):
        end = self.keys.shape[2] + key_states.shape[2]
        for x, new in zip(self.stored, (key_states, value_states)):
            x[:, :, self.keys.shape[2] : end] = new
        self.keys, self.values = (x[:, :, :end] for x in self.stored)
        return self.keys, self.values

    def batch_select_indices(self, indices):
        end = self.keys.shape[2]
        for x in self.stored:
            x[: len(indices), :, :end] = x[indices, :, :end]
        self.stored = [x[: len(indices)] for x in self.stored]
        self.keys, self.values = (x[:, :, :end] for x in self.stored)


@torch.no_grad()
def _sample_wave(model, prompts, temperature, stop_ids, noise, plain, alone=True):
    """P prompts, noise (B, max_new_tokens) -> B pairs of ids and log-probs. Left-padded prompts go through
    the model once, and their generations share their keys and values. The host waits for the device only to
    ask which rows have ended, every CHECK_EVERY steps. `alone`: no other process takes part in the steps."""
    device, width, (rows, max_new_tokens) = model.device, max(map(len, prompts)), noise.shape
    repeats, every = rows // len(prompts), CHECK_EVERY.get(device.type, 16)
    token = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=device)
    seen = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
    # left padding without positions of its own is wrong for learned ones (GPT-2)
    position = (seen.cumsum(1) - 1).clamp(min=0)
    cache = transformers.DynamicCache(config=model.config)
    inputs = dict(input_ids=token, attention_mask=seen, position_ids=position, past_key_values=cache)
    logits = model(**inputs, use_cache=True, logits_to_keep=1).logits[:, -1].float()
    usual = _full_attention(model, cache) and all(layer.is_initialized for layer in cache.layers)
    if not usual and not plain:
        plain = True
        say_once(f"sampling: {type(model).__name__} keeps transformers' growing cache, slower than our own")
    if plain:
        cache.batch_repeat_interleave(repeats)
    else:
        kind = device.type  # under autocast attention takes bfloat16, whatever rotary embeddings gave
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        for i, layer in enumerate(cache.layers):
            cache.layers[i] = PreallocatedLayer(layer, repeats, max_new_tokens, dtype)
    logits, seen, position = (x.repeat_interleave(repeats, 0) for x in (logits, seen, position[:, -1:]))
    seen = torch.cat([seen, seen.new_ones(rows, max_new_tokens)], 1)
    if not plain:  # in the form that attention takes, else transformers looks into it at every step
        seen = seen.bool()[:, None, None] if min(map(len, prompts)) < width else None
    tokens = torch.zeros(rows, max_new_tokens, dtype=torch.long, device=device)
    logps = torch.zeros(rows, max_new_tokens, device=device)
    row = torch.arange(rows, device=device)  # which row each line of the cache belongs to
    unfinished = torch.ones(rows, dtype=torch.bool, device=device)
    stop_ids = torch.tensor(stop_ids, device=device)
    for t in range(max_new_tokens):
        logp = (logits / (temperature or 1.0)).log_softmax(-1)
        if temperature:
            cdf = logp.exp().cumsum(-1, dtype=torch.float64)
            # right=True: a token of probability 0 is never drawn
            token = torch.searchsorted(cdf, noise[row, t, None] * cdf[:, -1:], right=True)
            token = token.clamp(max=logp.shape[-1] - 1)
        else:
            token = logp.argmax(-1, keepdim=True)
        tokens[row, t], logps[row, t] = token[:, 0], logp.gather(-1, token)[:, 0]
        unfinished &= ~torch.isin(token[:, 0], stop_ids)
        if t + 1 == max_new_tokens:
            break
        if (t + 1) % every == 0:
            left = int(unfinished.sum())
            if (left if alone else over_ranks(left)) == 0:
                break
            if 0 < left <= 0.75 * len(row):  # drop finished rows, but not at every step: it copies the cache
                keep = unfinished.nonzero()[:, 0]
                cache.batch_select_indices(keep)
                row, token, position, unfinished = (x[keep] for x in (row, token, position, unfinished))
                seen = None if seen is None else seen[keep]
        position = position + 1
        mask = None if seen is None else seen[..., : width + t + 1]
        inputs = dict(input_ids=token, attention_mask=mask, position_ids=position, past_key_values=cache)
        logits = model(**inputs, use_cache=True).logits[:, -1].float()
    ended = torch.isin(tokens, stop_ids)
    lengths = torch.where(ended.any(1), ended.int().argmax(1) + 1, max_new_tokens).tolist()
    return [(x[:n], y[:n]) for x, y, n in zip(tokens.tolist(), logps.tolist(), lengths)]


def completion_text(tokenizer, prompt_ids, completion_ids):
    """decode(prompt + completion) less decode(prompt), no special tokens; alone it could lose a space."""
    options = dict(skip_special_tokens=True, clean_up_tokenization_spaces=False)
    before, whole = (tokenizer.decode(ids, **options) for ids in (prompt_ids, prompt_ids + completion_ids))
    return whole[len(before) :] if whole.startswith(before) else tokenizer.decode(completion_ids, **options)


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
    number = re.search(NUMBER, answer) or ([None] + list(re.finditer(NUMBER, text)))[-1]
    return number and Decimal(re.sub(r"[$,]", "", number[0]).replace("−", "-"))


def gsm8k_checker(prompts, completions, rows):
    """1.0 where the completion's number is that of the column `answer` (Cobbe et al. 2021), else 0.0."""
    answers = [gsm8k_number(row["answer"]) for row in rows]
    return [float(a is not None and gsm8k_number(c) == a) for c, a in zip(completions, answers)]


CHECKERS = {TASK: task_checker, "gsm8k": gsm8k_checker}  # they read the column `answer` of the data set


def find_gold(examples, reward=None):
    """The exact checker of the data set itself, for `gold`: --reward, if it is one; None if there is none."""
    if reward in CHECKERS:
        return CHECKERS[reward]
    rows = [e["row"] for e in examples]
    if all("question" in row and "####" in str(row.get("answer")) for row in rows):
        return gsm8k_checker
    return task_checker if all(e["where"].startswith(f"{TASK} row") for e in examples) else None


def find_checker(reward, examples):
    """--reward -> function(prompts, completions, rows) -> list[float | None]; None if it names a model."""
    if reward is None:
        stop(f"--reward is missing: a reward model, {', '.join(CHECKERS)}, or path/file.py:function")
    if reward in CHECKERS:
        for where, row in ((e["where"], e["row"]) for e in examples):
            if not isinstance(row.get("answer"), str):
                stop(f"{where}: --reward {reward} reads a text `answer`, found the keys {', '.join(row)}")
            if CHECKERS[reward]([""], [row["answer"]], [row | {"finished": True}]) != [1.0]:
                stop(f"{where}: --reward {reward} finds no answer in `answer`, {row['answer'][-60:]!r}")
        return CHECKERS[reward]
    path, _, name = reward.rpartition(":")
    if reward.endswith(".py"):
        stop(f"--reward {reward}: say which function of it, {reward}:function")
    if not path.endswith(".py"):
        return None
    if not Path(path).is_file():
        stop(f"--reward {reward}: there is no file {path}")
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # (dataclasses in that file look themselves up)
    spec.loader.exec_module(module)
    if not callable(getattr(module, name, None)):
        stop(f"--reward {reward}: {path} has no function {name}")
    return getattr(module, name)


def call_checker(function, tokenizer, examples, completions, stop_ids):
    """Completions (lists of ids) by a checker -> (B,) float32, NaN for None (cannot judge), and texts."""
    texts = [completion_text(tokenizer, e["prompt_ids"], c) for e, c in zip(examples, completions)]
    rows = [e["row"] | {"finished": bool(c) and c[-1] in stop_ids} for e, c in zip(examples, completions)]
    prompts, name = [e["prompt"] for e in examples], f"the reward {getattr(function, '__name__', function)}"
    try:
        scores = on_first_rank(lambda: function(prompts, texts, rows))
    except Exception as error:  # whatever a user's function raises
        if rank() > 0:  # which did not call it
            raise
        found, where = error, f"none of the first {min(64, len(rows))} rows alone"
        for e, *inputs in list(zip(examples, prompts, texts, rows))[:64]:  # alone, to find the one
            try:
                function(*([x] for x in inputs))
            except Exception as alone:
                found, where = alone, f"{e['where']}, completion {inputs[1][:60]!r}"
                break
        frames = traceback.extract_tb(found.__traceback__)
        frame = next((f for f in frames if f.filename != __file__), frames[-1])  # the function's own
        line = f"{Path(frame.filename).name} line {frame.lineno}"
        stop(f"{name} raised {type(found).__name__} ({one_line(str(found), 200)}) in {line}, for {where}")
    if not isinstance(scores, (list, tuple)) or len(scores) != len(texts):
        found = f"{len(scores)} values" if hasattr(scores, "__len__") else f"a {type(scores).__name__}"
        stop(f"{name} returned {found}; wanted a list of {len(texts)}, a number or None per completion")
    for text, score in zip(texts, scores):
        if score is not None and not (isinstance(score, numbers.Real) and math.isfinite(score)):
            stop(f"{name} returned {score!r} for {text[:60]!r}; return None where it cannot judge")
    return torch.tensor([math.nan if score is None else float(score) for score in scores]), texts


def same_ids(tokenizer, other):
    """True if every token has the same id in the other tokenizer (which may have more: a PAD of its own)."""
    return tokenizer.get_vocab().items() <= other.get_vocab().items()


@as_forward
def _head_at_last(model, input_ids, attention_mask):
    hidden = backbone(model, input_ids, attention_mask)
    last = hidden[torch.arange(len(hidden), device=hidden.device), attention_mask.sum(1) - 1].float()
    return (last * model.score.weight[0]).sum(-1)


def _own_forward(model, input_ids, attention_mask):
    if len(input_ids) == 0:  # as in backbone
        return model(input_ids.new_zeros(1, 2)).logits[:0, 0].float()
    return model(input_ids, attention_mask=attention_mask).logits[:, 0].float()


class RewardModel:
    """--reward as a model: examples and completions (lists of ids) -> scores (B,) float32 on the CPU. A plain
    `score` head is read at the last real token, by length, as in reward_model.py: transformers pools at the
    last id that is not PAD, which misreads a sampled PAD. Any other head is read by the model's own forward.
    Another tokenizer gets the text, or messages through its own chat template."""

    def __init__(self, args, tokenizer, device, autocast, stop_ids, longest):
        self.args, self.policy_tokenizer, self.stop_ids, self.autocast = args, tokenizer, stop_ids, autocast
        self.tokenizer = load_tokenizer(args.reward, "--reward")
        self.control, self.end = control_tokens(self.tokenizer), end_of_turn_id(self.tokenizer)
        self.model = load_scorer(args.reward, device, "--reward")
        self.same_ids = same_ids(tokenizer, self.tokenizer)
        if self.same_ids:
            check_context(self.model, longest, "--max-prompt-length or --max-completion-length")
        head = getattr(self.model, "score", None)
        self.has_score_head = isinstance(head, nn.Linear) and head.bias is None

    @torch.no_grad()
    def score(self, examples, completions):
        pairs = list(zip(examples, completions))
        sequences = [e["prompt_ids"] + c if self.same_ids else self.translate(e, c) for e, c in pairs]
        pad_id = 0 if self.has_score_head else self.tokenizer.pad_token_id or 0  # (its own forward may look)
        batch = pad_batch(sequences, sequences, self.model.device, pad_id)
        read = _head_at_last if self.has_score_head else _own_forward
        inputs = batch, self.args.micro_batch_tokens, self.autocast
        scores = over_micro_batches(lambda *x: read(self.model, *x[:2])[:, None], *inputs)[:, 0].cpu()
        if not torch.isfinite(scores).all():
            stop(f"--reward {self.args.reward} gave a score that is not finite", 1)
        return scores

    __call__ = score

    def translate(self, example, completion):
        """Prompt and completion in this model's own tokens."""
        prompt, finished = example["prompt"], completion[-1] in self.stop_ids
        text = completion_text(self.policy_tokenizer, example["prompt_ids"], completion)
        text = spaced(text, self.control)  # spelled by the policy: content, not control
        if is_chat := isinstance(prompt, list):
            prompt = [m | {"content": spaced(m["content"], self.control)} for m in prompt]
            text = _render(self.tokenizer, f"--reward {self.args.reward}", _with_answer(prompt, text))
        ids = encode(self.tokenizer, [text if is_chat else prompt + text], is_chat, keep_eos=True)[0]
        ids = with_end(self.tokenizer, ids, self.end, is_chat, finished)
        if len(ids) > self.tokenizer.model_max_length:
            stop(f"--reward {self.args.reward}: {len(ids)} tokens are too long for it", 1)
        return ids


def load_reward(args, tokenizer, examples, stop_ids, device, autocast):
    """--reward, and the data set's own exact checker -> score, gold: functions of examples and completions
    (lists of ids) that give (B,) float32, NaN where a checker cannot judge. gold is None if there is none."""
    checker, gold = find_checker(args.reward, examples), find_gold(examples, args.reward)
    longest = max(len(e["prompt_ids"]) for e in examples) + args.max_completion_length
    model_inputs = args, tokenizer, device, autocast, stop_ids, longest
    score = judge(checker, tokenizer, stop_ids) if checker else RewardModel(*model_inputs)
    return score, judge(gold, tokenizer, stop_ids)


def judge(checker, tokenizer, stop_ids):
    """A checker as a function of examples and completions (lists of ids) -> (B,) float32; None if None."""
    if checker is None:
        return None
    return lambda examples, ids: call_checker(checker, tokenizer, examples, ids, stop_ids)[0]


@torch.no_grad()
def evaluate_samples(policy, examples, tokenizer, stop_ids, seed, autocast, sampling, judges, kl_from=None):
    """Held-out prompts, one greedy completion and G sampled ones each -> metrics, and a sampled completion of
    each prompt with its numbers.

    sampling: G, tokens at most, temperature. judges: score and gold, as load_reward gives them; without any
    nothing is greedy. kl_from: function(model, batch) -> log-probs and entropy, and one that gives the
    reference. Metrics: score, gold, pass@G, the share that ends in EOS, tokens, KL in nats per sequence."""
    judges = {name: judge for name, judge in judges.items() if judge is not None}
    prompts, metrics = [e["prompt_ids"] for e in examples], {}
    passes = [("_greedy", 1, 0.0)] if judges else []
    for suffix, number, temperature in [*passes, ("", sampling[0], sampling[2])]:
        options = number, sampling[1], temperature, stop_ids, generator(seed, "evaluate")
        with autocast():
            completions, _ = sample(policy, prompts, *options)
        picked = [e for e in examples for _ in range(number)]
        columns = {name: judge(picked, completions) for name, judge in judges.items()}
        metrics |= {f"eval/{name}{suffix}": values.nanmean() for name, values in columns.items()}
    if "gold" in judges and number > 1:
        metrics[f"eval/pass@{number}"] = columns["gold"].view(-1, number).amax(1).mean()
    metrics["eval/eos_rate"] = sum(c[-1] in stop_ids for c in completions) / len(completions)
    metrics["eval/completion_length"] = sum(map(len, completions)) / len(completions)
    if kl_from is not None:
        logprobs_of, reference = kl_from
        batch = completion_batch([e["prompt_ids"] for e in picked], completions, policy.device)
        columns["kl"], ref_logps = (logprobs_of(model, batch)[0].sum(1) for model in (policy, reference()))
        columns["kl"] -= ref_logps
        metrics["eval/kl"] = columns["kl"].mean()
    texts = [completion_text(tokenizer, p, c) for p, c in zip(prompts, completions[::number])]
    rows = [{"prompt": e["prompt"], "completion": text} for e, text in zip(examples, texts)]
    for name, values in columns.items():
        rows = [row | {name: value} for row, value in zip(rows, values[::number].tolist())]
    return metrics, rows


# ---------------------------------------------------------------- 9. runs
def make_optimizer(models, args, eps=1e-8):
    """AdamW on float32 weights; weight decay on matrices only."""
    groups = []
    for params in ([p for p in model.parameters() if p.requires_grad] for model in models):
        groups += [dict(params=[p for p in params if p.ndim >= 2], weight_decay=args.weight_decay)]
        groups += [dict(params=[p for p in params if p.ndim < 2], weight_decay=0.0)]
    return torch.optim.AdamW(groups, lr=args.learning_rate, eps=eps, fused=True)


def set_learning_rate(optimizer, args, step, steps):
    """Linear warm-up, then --lr-schedule, to 0 after the last step: a function of the step alone."""
    done = max(0, step - args.warmup_steps) / max(1, steps - args.warmup_steps)
    decay = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}
    warm = min(1.0, (step + 1) / (args.warmup_steps + 1))
    rate = args.learning_rate * decay[args.lr_schedule] * warm
    for group in optimizer.param_groups:
        group["lr"] = rate
    return rate


def find_checkpoint(folder):
    """Its checkpoint, or the one before if the run died between the two renames; None if it has none."""
    names = [Path(folder, name) for name in ("checkpoint", "checkpoint.old")]
    return next((name for name in names if (name / "state.json").is_file()), None)


def due(every, step, steps):
    """True after every `every`-th step (0: none of them) and after the last."""
    return step == steps or (every > 0 and step % every == 0)


def replace_text(path, text):
    """Write a file whole or not at all; the first process does."""
    new = path.with_name(path.name + ".new")
    if rank() == 0:
        with open(new, "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        new.rename(path)


def escaped(text):
    """Newlines, control characters and halves of surrogate pairs as Python writes them: for a terminal."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def one_line(text, width):
    """`text` in `width` characters: escaped, a long middle cut out."""
    text = escaped(text)
    return text if len(text) <= width else f"{text[: width - width // 3 - 1]}…{text[-(width // 3) :]}"


def append_lines(path, rows):
    """Rows as JSON lines at the end of a file, NaN as null; the first process writes."""
    if rank() == 0:
        with open(path, "a") as file:
            for row in rows:
                bad = {k: None for k, v in row.items() if isinstance(v, float) and not math.isfinite(v)}
                file.write(json.dumps(row | bad, default=str) + "\n")


class Run:
    """A run's folder (args.json, logs, checkpoint/, at last the model) and screen, for the first process."""

    def __init__(self, args, steps):
        self.args, self.steps, self.dir, self.tracker = args, steps, Path(args.output_dir), None
        file, old = self.dir / "args.json", self.dir.with_name(self.dir.name + ".old")
        if rank() == 0 and file.exists() and not args.resume:  # --overwrite, else setup() had stopped
            shutil.rmtree(old, ignore_errors=True)
            self.dir.rename(old)
            print(f"{self.dir} held an earlier run; it is now {old}")
        with self.writing():
            if rank() == 0:
                self.dir.mkdir(parents=True, exist_ok=True)
            replace_text(file, json.dumps(dataclasses.asdict(args), indent=1) + "\n")
        if world() > 1:
            distributed.barrier()  # the folder is there
            args.track = args.track if rank() == 0 else "none"
        if args.track == "wandb":
            import wandb

            self.tracker = wandb.init(project="onefile-rlhf", dir=self.dir, config=dataclasses.asdict(args))
        elif args.track == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter

            self.tracker = SummaryWriter(self.dir)
        form = "{percentage:3.0f}%|{bar:8}| {n_fmt}/{total_fmt}, {remaining} left{postfix}"
        is_log = rank() > 0 or not sys.stderr.isatty()
        self.bar = tqdm(total=steps, disable=is_log, dynamic_ncols=True, bar_format=form)
        self.started, self.signal, self.handlers, self.pid = time.time(), None, {}, os.getpid()
        with contextlib.suppress(ValueError):  # signals belong to the main thread
            for number in (signal.SIGINT, signal.SIGTERM):
                self.handlers[number] = signal.signal(number, self.interrupt)

    def interrupt(self, number, frame):
        """The first Ctrl-C or SIGTERM: finish the step, save, exit. The second one stops at once."""
        is_alone, is_ours = world() == 1, os.getpid() == self.pid
        for each in self.handlers:  # (torchrun sends its own after Ctrl-C, and kills what is left in 30 s)
            signal.signal(each, signal.SIG_DFL if is_alone or not is_ours else signal.SIG_IGN)
        if not is_ours:  # a process that a reward function forked: nothing to save there
            return os.kill(os.getpid(), number)
        self.signal, then = number, "; once more stops at once" if is_alone else ""
        with contextlib.suppress(BrokenPipeError):
            if rank() == 0:
                os.write(2, f"\n{signal.Signals(number).name}: stopping after this step{then}\n".encode())

    def interruption(self):
        """The signal that came to one of the processes, in all of them; else None."""
        found = over_ranks(self.signal or 0, op="max") or None
        self.signal = self.signal or found  # (one may have come meanwhile; the next step's call sees it)
        return found

    def exit_if_interrupted(self, done):
        """End the process if a signal came, with the exit status that shells expect; `done` says how far."""
        number = self.interruption()
        if number is not None:
            self.restore_handlers()
            with contextlib.suppress(BrokenPipeError):
                self.bar.close()
                if rank() == 0:
                    print(f"stopped after {done}; go on with the same command and --resume", file=sys.stderr)
            raise SystemExit(128 + number)

    def restore_handlers(self):
        """Give Ctrl-C and SIGTERM back to whoever called main."""
        for number, handler in self.handlers.items():
            signal.signal(number, handler or signal.SIG_DFL)

    @contextlib.contextmanager
    def writing(self):
        """A full disk ends the run with a sentence; the last good checkpoint stays."""
        try:
            yield
        # safetensors and torch have errors of their own for a write that fails
        except (OSError, SafetensorError, RuntimeError) as error:
            written = ("PytorchStreamWriter", "iostream", "unexpected pos")
            if isinstance(error, RuntimeError) and not any(words in str(error) for words in written):
                raise
            shutil.rmtree(self.dir / "checkpoint.new", ignore_errors=True)
            reason, found = " ".join(str(error).split())[:200], find_checkpoint(self.dir)
            then = "no step is saved: make room and start again with --overwrite"
            if found is not None:
                step = json.loads((found / "state.json").read_text())["step"]
                then = f"step {step} is saved: make room and go on with --resume"
            stop(f"{self.dir} cannot be written ({reason}); {then}", 1)

    def restore(self, models, optimizer):
        """--resume: read models and optimiser, cut the logs back to the checkpoint -> steps done (else 0)."""
        if not self.args.resume:
            return 0
        folder = find_checkpoint(self.dir)
        step = json.loads((folder / "state.json").read_text())["step"]
        for name, model in models.items():
            own = dict([*model.named_parameters(), *model.named_buffers()])
            with safe_open(folder / f"{name}.safetensors", "pt") as file, torch.no_grad():
                for key in file.keys():
                    own[key].copy_(split_like(file.get_tensor(key), own[key]))
        options = dict(weights_only=True, map_location="cpu", mmap=torch.cuda.is_available())
        state = torch.load(folder / "optimizer.pt", **options)
        for i, parameter in enumerate(p for group in optimizer.param_groups for p in group["params"]):
            state["state"][i] = {k: split_like(x, parameter) for k, x in state["state"].get(i, {}).items()}
        optimizer.load_state_dict(state)
        for log in filter(Path.exists, [self.dir / "metrics.jsonl", self.dir / "samples.jsonl"]):
            lines = [line for line in log.read_text().splitlines(keepends=True) if line.endswith("\n")]
            with self.writing():
                replace_text(log, "".join(line for line in lines if json.loads(line)["step"] <= step))
        print(f"resumed after step {step} of {self.steps}")
        self.bar.update(step)
        return step

    def checkpoint(self, step, models, optimizer):
        """Write what --resume needs, whole or not at all: under a new name, flushed, then renamed. Generators
        and the position in the data are functions of seed and step, so that the step stands for them."""
        weights = {name: whole_weights(model) for name, model in models.items()}
        state = optimizer.state_dict()
        for i, moments in state["state"].items():
            state["state"][i] = {key: whole(x) for key, x in moments.items()}
        if rank() == 0:
            self._write(step, weights, state)
        if world() > 1:
            distributed.barrier()

    def _write(self, step, weights, state):
        new, now, old = (self.dir / name for name in ("checkpoint.new", "checkpoint", "checkpoint.old"))
        for folder in (new, old) if now.exists() else (new,):  # never more than two
            shutil.rmtree(folder, ignore_errors=True)
        with self.writing():
            new.mkdir()
            for name, tensors in weights.items():
                save_file(tensors, new / f"{name}.safetensors")
            torch.save(state, new / "optimizer.pt")
            (new / "state.json").write_text(json.dumps({"step": step}))
            for path in (*new.iterdir(), new, *self.dir.glob("*.jsonl")):
                handle = os.open(path, os.O_RDONLY)
                os.fsync(handle)
                os.close(handle)
            if now.exists():
                now.rename(old)
            new.rename(now)
        shutil.rmtree(old, ignore_errors=True)

    def checkpoint_if_due(self, step, models, optimizer, is_last=False):
        """After every --save-every-th step, after the last, and before Ctrl-C or SIGTERM ends the run."""
        number = self.interruption()
        if number is not None or is_last or due(self.args.save_every, step, self.steps):
            self.checkpoint(step, models, optimizer)
        if number is not None and step < self.steps and not is_last:
            self.exit_if_interrupted(f"step {step} of {self.steps}")

    def log(self, step, metrics, show):
        """A line of metrics.jsonl; what `show` names also goes to the progress bar or, in a log, a line."""
        metrics = {name: float(value) for name, value in metrics.items()}
        if torch.cuda.is_available():
            metrics["peak_memory_gib"] = over_ranks(torch.cuda.max_memory_allocated() / 2**30, op="max")
        with self.writing():
            append_lines(self.dir / "metrics.jsonl", [{"step": step} | metrics])
        for name, value in metrics.items() if self.args.track == "tensorboard" else []:
            self.tracker.add_scalar(name, value, step)
        if self.args.track == "wandb":
            self.tracker.log(metrics, step=step)
        shown = [f"{name} {metrics[name]:.3g}" for name in show if name in metrics]
        while (
            shown and not self.bar.disable and len("  ".join(shown)) > shutil.get_terminal_size().columns - 40
        ):
            shown.pop()  # the last ones, where a terminal is narrow
        numbers = "  ".join(shown)
        held_out = [f"{name[5:]}\xa0{v:.3f}" for name, v in metrics.items() if name.startswith("eval/")]
        with contextlib.suppress(BrokenPipeError):  # Ctrl-C ends `| tee` first; the step must still be saved
            self.bar.update(step - self.bar.n)
            self.bar.set_postfix_str(numbers)
            if self.bar.disable and numbers and due(self.args.log_every, step, self.steps):
                print(f"step {step}/{self.steps}  {numbers}  {time.time() - self.started:.0f} s", flush=True)
            if held_out:
                line = f"step {step}/{self.steps}  held out: {'  '.join(held_out)}"
                width = 10**6 if self.bar.disable else shutil.get_terminal_size().columns
                tqdm.write(textwrap.fill(line, width, subsequent_indent="    ").replace("\xa0", " "))

    def samples(self, step, rows):
        """Write rows of prompt, completion and numbers to samples.jsonl, and show the first three."""
        with self.writing():
            append_lines(self.dir / "samples.jsonl", [{"step": step} | row for row in rows])
        prompts = [row["prompt"] for row in rows[:3]]
        prompts = [p if isinstance(p, str) else p[-1]["content"] for p in prompts]
        numbers = ["".join(f" {k} {v:.2f}" for k, v in r.items() if isinstance(v, float)) for r in rows[:3]]
        width = max(40, shutil.get_terminal_size().columns - 9 - max(map(len, numbers), default=0))
        prompts = [one_line(prompt, width // 3) for prompt in prompts]
        texts = [one_line(row["completion"], width * 2 // 3) for row in rows[:3]]
        wide, long = (max(map(len, column), default=0) for column in (prompts, texts))
        for prompt, text, found in zip(prompts, texts, numbers):
            with contextlib.suppress(BrokenPipeError):
                tqdm.write(f"  {prompt:<{wide}} | {text:<{long}} |{found}")

    def stop_unless_finite(self, step, rows, **quantities):
        """Stop, before the update is made, if any is not finite, with the batch's rows in bad_batch.json."""
        file = self.dir / "bad_batch.json"
        for name, value in quantities.items():
            if not math.isfinite(value):
                with self.writing():
                    replace_text(file, json.dumps(rows, default=str, indent=1))
                found = f"step {step}: {name} is {float(value)}, and that update was not made"
                stop(f"{found}; its batch is in {file}; --resume with a lower --learning-rate?", 1)

    def finish(self, model, tokenizer, stop_ids, then):
        """Save model and tokenizer for from_pretrained, with all EOS ids, and say what to run next."""
        if model.can_generate():
            ids = dict(bos_token_id=tokenizer.bos_token_id, pad_token_id=tokenizer.pad_token_id)
            ids["eos_token_id"] = stop_ids if len(stop_ids) > 1 else stop_ids[0]
            # nothing else of the checkpoint: its top-k and top-p were not trained with, and may not even save
            model.generation_config = transformers.GenerationConfig(**ids)
        weights = whole_weights(model) if isinstance(model, FSDPModule) else None
        with self.writing():
            if rank() == 0:
                model.save_pretrained(self.dir, state_dict=weights)
                tokenizer.save_pretrained(self.dir)
        if world() > 1:
            distributed.barrier()
            atexit.register(distributed.destroy_process_group)  # (after a failure it could wait for others)
        self.bar.close()
        self.restore_handlers()
        if self.tracker is not None:
            (self.tracker.finish if self.args.track == "wandb" else self.tracker.close)()
        print(f"{time.time() - self.started:.0f} s; the model is in {self.dir}; next: {then}")
