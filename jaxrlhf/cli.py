# SPDX-License-Identifier: Apache-2.0
"""The command line: words to a checked configuration, and on to the stage.

Nothing heavy is imported before it is needed: `jaxrlhf --help` reads neither the sections nor jax.
"""

from __future__ import annotations

import argparse
import errno
import importlib.util
import os
import re
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from jaxrlhf.errors import ConfigError, JaxrlhfError

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

    from jaxrlhf.config.schema import Shape
    from jaxrlhf.config.stages import StageConfig

HELP = """\
usage: jaxrlhf COMMAND [-c FILE.yaml ...] [key.path=value ...] [options]

From a language model and feedback to an aligned model.

  run PIPELINE.yaml   stages in order; finished ones are skipped
  pretrain            a language model on plain text
  sft                 supervised fine-tuning on demonstrations
  reward              a reward model from comparisons
  dpo                 a policy straight from comparisons (DPO)
  ppo                 a policy by reinforcement learning (PPO, or GRPO's and RLOO's advantages)
  generate            completions for prompts
  score               log-probs or rewards of given completions
  eval                perplexity, accuracy, rewards, KL and win rates, with intervals
  data show|pairs     rows as the model will see them; rankings to pairs
  export RUN          a run as an HF folder, or its adapter as a PEFT folder
  report RUN...       one HTML page of plots, tables and samples
  chat                talk to a model in the terminal
  env                 versions, devices, commit; --models: what was measured of each family

Later files override earlier ones, key=value overrides both.
`jaxrlhf COMMAND --help` lists its options and keys with their defaults.
"""

COMMANDS = (
    "run",
    "pretrain",
    "sft",
    "reward",
    "dpo",
    "ppo",
    "generate",
    "score",
    "eval",
    "data show",
    "data pairs",
    "export",
    "report",
    "chat",
    "env",
)
TRAINING = ("pretrain", "sft", "reward", "dpo", "ppo")
# What a bare word after the command is: the key it sets, and its name in the usage line.
OPERANDS = {
    "score": ("data", "DATA"),
    "export": ("model.path", "RUN"),
    "report": ("runs", "RUN"),
    "data show": ("data.train", "SOURCE"),
    "data pairs": ("data", "SOURCE"),
}
WITH_OUTPUT_FILE = ("generate", "score", "export", "report", "data pairs")
OVERRIDE = re.compile(r"[A-Za-z_][\w.\[\]-]*=")
NO_ROOM = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)
# What a place that somebody named cannot be used for.
NO_PLACE = (
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.EEXIST, errno.EIO),
    *(errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP),
)
MAX_LINES = 40  # of an error: one screen


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code: 0 done, 2 wrong settings, 143 resumable, else 1.

    Errors meant for the user are printed without a traceback; anything else is a bug and keeps it.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        if argv is None:
            use_huge_pages(arguments)
        return command_line(arguments)
    except JaxrlhfError as error:
        print(one_screen(f"error: {error}"), file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output left, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        if error.errno in NO_PLACE and error.filename:
            place = error.filename2 or error.filename
            print(one_screen(f"error: {place}: {error.strerror}"), file=sys.stderr)
            return 1
        if error.errno not in NO_ROOM:
            raise
        where = f" {error.filename}" if error.filename else ""
        print(
            one_screen(
                f"error: cannot write{where}: {error.strerror}. Free some space and call it again: "
                "what has been saved so far is untouched"
            ),
            file=sys.stderr,
        )
        return 1


def command_line(arguments: list[str]) -> int:
    """As `main`, but errors are raised."""
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(HELP, end="")
        return 0
    if arguments[0] == "--version":
        from importlib.metadata import version

        print(f"jaxrlhf {version('jaxrlhf')}")
        return 0
    command, rest = arguments[0], arguments[1:]
    if command == "data":
        command, rest = " ".join(arguments[:2]), arguments[2:]
        if command in ("data", "data -h", "data --help"):
            print("usage: jaxrlhf data show SOURCE ... | jaxrlhf data pairs SOURCE ...")
            return 0 if len(arguments) > 1 else 2
    if command not in COMMANDS:
        import difflib

        close = difflib.get_close_matches(command, COMMANDS, n=1)
        hint = f"did you mean {close[0]}?" if close else f"commands: {', '.join(COMMANDS)}"
        raise ConfigError(f"{command}: unknown command; {hint}")
    if command == "env":
        return env(rest)
    options, unknown = parser(command).parse_known_intermixed_args(rest)
    if unknown:
        named = [word for word in unknown if word.startswith("-")] or unknown  # without values
        raise ConfigError("\n".join(not_an_option(command, word, rest) for word in named))
    if options.help:
        print(help_text(command), end="")
        return 0
    overrides = [item for item in options.items if OVERRIDE.match(item)]
    operands = [item for item in options.items if not OVERRIDE.match(item)]
    if command == "run":
        return run(options, operands, overrides)
    return stage(command, options, operands, overrides)


class Parser(argparse.ArgumentParser):
    """Whose errors are as those of settings: raised, not printed."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{self.prog}: {message}")


def not_an_option(command: str, word: str, words: list[str]) -> str:
    """What to say of a word with dashes that the command does not know: most are meant as keys."""
    import difflib

    flag, equals, value = word.partition("=")
    options = [name for action in parser(command)._actions for name in action.option_strings]
    if close := difflib.get_close_matches(flag, options, n=1, cutoff=0.8):
        return f"{word}: unknown option of {command}; did you mean {close[0]}?"
    following = words[words.index(word) + 1 :][:1]
    if not equals and following and not following[0].startswith("--"):
        value = following[0]
    key = flag.lstrip("-").replace("-", "_")
    return (
        f"{word}: unknown option of {command}; settings are given without dashes: write "
        f"{key}={value or 'VALUE'}"
    )


def parser(command: str) -> argparse.ArgumentParser:
    """The options of one command; keys of the configuration are not options."""
    found = Parser(f"jaxrlhf {command}", add_help=False, allow_abbrev=False)
    found.add_argument("items", nargs="*")
    found.add_argument("-h", "--help", action="store_true")
    found.add_argument("--print-config", action="store_true")
    found.add_argument("--dry-run", action="store_true")
    found.add_argument("--output", metavar="DIR")
    found.add_argument("-c", "--config", action="append", default=[], metavar="FILE.yaml")
    if command in TRAINING or command == "run":
        found.add_argument("--resume", default="auto", metavar="auto|never|PATH")
        found.add_argument("--allow-change", action="append", default=[], metavar="KEY")
    if command not in ("run", "report", "data pairs"):
        found.add_argument("-m", "--model", metavar="MODEL")
    if command in WITH_OUTPUT_FILE:
        found.add_argument("-o", "--out", metavar="OUT")
    if command == "generate":
        found.add_argument("--prompt", action="append", metavar="TEXT")
        found.add_argument("--prompts", action="append", metavar="FILE")
        found.add_argument("-n", type=int)
    if command == "export":
        found.add_argument("--format", metavar="hf|merged|peft")
    return found


def stage(
    command: str, options: argparse.Namespace, operands: list[str], overrides: list[str]
) -> int:
    """Checks the settings of one stage and runs it."""
    from jaxrlhf.config.load import load, to_yaml

    keywords = flags(command, options, operands)
    config = load(command, options.config, overrides, second_pass, keywords=keywords, note=note)
    if options.print_config:
        print(to_yaml(config), end="")
        return 0
    prepare(config)
    if command == "report" and not options.dry_run:
        return report(config)
    from jaxrlhf.stages import run_stage

    extra: dict[str, Any] = {}
    if command in TRAINING:
        extra = {"resume": options.resume, "allow_change": tuple(options.allow_change)}
        extra["dry_run"] = options.dry_run
    elif options.dry_run:
        extra = {"dry_run": True}
    result = run_stage(command, config, output=config.output_dir, **extra)
    if options.dry_run:
        print(f"{command}: {result.message}")
    return int(result.exit_code)


def report(config: Any) -> int:
    """Writes the page and says where it is."""
    from pathlib import Path

    from jaxrlhf.report import write_report

    runs = [Path(run) for run in config.runs]
    place = Path(config.output or config.output_dir or runs[0])
    if config.output is None and place.suffix != ".html":
        place /= "report.html"
    page = write_report(runs, place)
    print(page)
    return 0


def flags(command: str, options: argparse.Namespace, operands: list[str]) -> dict[str, Any]:
    """The options that stand for keys, as {key: value}."""
    found: dict[str, Any] = {}
    if operands:
        if command not in OPERANDS:
            word = operands[0]
            hint = f"-c {word}" if word.endswith((".yaml", ".yml")) else "key=value"
            raise ConfigError(f"{word}: not understood after `{command}`; did you mean {hint}?")
        key, name = OPERANDS[command]
        if key == "model.path" and len(operands) > 1:
            raise ConfigError(f"{' '.join(operands)}: {command} takes one {name}")
        found[key] = operands[0] if key == "model.path" else operands
    given = vars(options)
    for option, key in (
        ("output", "output_dir"),
        ("model", "model.path"),
        ("out", "output"),
        ("prompt", "prompt"),
        ("prompts", "prompts"),
        ("n", "n"),
        ("format", "format"),
    ):
        if given.get(option) is not None:
            found[key] = given[option]
    return found


def run(options: argparse.Namespace, operands: list[str], overrides: list[str]) -> int:
    """Checks every stage of a pipeline and runs those that are not finished."""
    from jaxrlhf.config.load import to_yaml
    from jaxrlhf.config.pipeline import load_pipeline

    files = [*operands, *options.config]
    if not files:
        raise ConfigError(
            "run: name a pipeline, e.g. jaxrlhf run configs/pipelines/quickstart.yaml"
        )
    if options.output is not None:
        overrides = [*overrides, f"output_dir={options.output}"]
    plan = load_pipeline(files, overrides, second_pass, note=note)
    if options.print_config:
        for planned in plan.stages:
            body = "".join(f"  {line}\n" for line in to_yaml(planned.config).splitlines())
            print(
                f"# {planned.name}, in {planned.folder}\n- stage: {planned.stage}\n{body}", end=""
            )
        return 0
    prepare(*(planned.config for planned in plan.stages))
    from jaxrlhf.pipeline import run_pipeline

    extra: dict[str, Any] = {"dry_run": True} if options.dry_run else {}
    if options.allow_change:
        extra["allow_change"] = tuple(options.allow_change)
    result = run_pipeline(plan, output=plan.output_dir, resume=options.resume, **extra)
    return int(result.exit_code)


def second_pass(config: StageConfig) -> Any:
    """The signatures of the named algorithms; only stages that name one import anything."""
    from jaxrlhf.config.stages import TrainingConfig

    if not isinstance(config, TrainingConfig):
        return []
    from jaxrlhf.stages import check_algorithms

    return check_algorithms(config)


def prepare(*configs: StageConfig) -> None:
    """What jax and the HF libraries read from the environment when they are first imported.

    Raises ConfigError where jax has started with another number of CPU devices than is asked for.
    """
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    compiled = {
        "JAX_COMPILATION_CACHE_DIR": os.path.join(cache, "jaxrlhf", "xla"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": 0.2,
    }
    for name, value in compiled.items():
        if name not in os.environ:
            os.environ[name] = str(value)
            if "jax" in sys.modules:  # it reads them only once, and checking settings imports it
                sys.modules["jax"].config.update(name.lower(), value)
    _split_cpu(configs)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    if importlib.util.find_spec("torch") is None:  # advice to install it; models here need none
        os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    if not any(map(uses_hub, configs)):  # nothing touches the network unless a hub name is given
        os.environ.setdefault("HF_HUB_OFFLINE", "1")


def _split_cpu(configs: Sequence[StageConfig]) -> None:
    """Makes the devices of mesh.cpu_devices, unless the environment names a number itself."""
    from jaxrlhf.config.mesh import Mesh

    counts = [getattr(config, "mesh", Mesh()).cpu_devices for config in configs]
    asked = {count for count in counts if count is not None}
    if not asked:
        return
    if len(asked) > 1:
        numbers = " and ".join(map(str, sorted(asked)))
        raise ConfigError(
            f"mesh.cpu_devices: stages of one pipeline ask for {numbers}; all run in one process, "
            "so give one number under `defaults`"
        )
    [count] = asked
    said = os.environ.get("JAX_NUM_CPU_DEVICES")
    if said or "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
        if said != str(count):
            note(
                f"mesh.cpu_devices = {count} is left out: the environment "
                f"({'JAX_NUM_CPU_DEVICES' if said else 'XLA_FLAGS'}) says how many there are"
            )
        return
    import jax

    try:
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError as error:  # it has started
        if jax.default_backend() == "cpu" and jax.local_device_count() != count:
            raise ConfigError(
                f"mesh.cpu_devices = {count}: in this process jax has already started with "
                f"{jax.local_device_count()} CPU device(s). Ask for {count} in the first call of a "
                "new process"
            ) from error


def uses_hub(config: StageConfig) -> bool:
    """Whether a model or data set is named that is no place on this machine."""
    from jaxrlhf.config.reward import is_function
    from jaxrlhf.config.schema import walk

    for _, value, shape in walk(config):
        if shape.where not in ("model", "source", "reward") or not isinstance(value, str):
            continue
        local = os.path.isabs(value) or value.startswith(("stage:", "tfds:"))
        if not local and not (shape.where == "reward" and is_function(value)):
            return True
    return False


def note(text: str) -> None:
    """A remark beside the output."""
    print(f"note: {printable(text)}", file=sys.stderr)


def env(rest: list[str]) -> int:
    """Prints where we are, or which models can be read."""
    if rest in (["-h"], ["--help"]):
        print(
            "usage: jaxrlhf env [--json | --models]\n\nVersions, devices, commit; secrets are "
            "hidden. --models: the model families, and what was measured of each."
        )
        return 0
    if rest == ["--models"]:
        import textwrap

        from jaxrlhf.models.families import verified

        print(f"{verified.text()}\n\n{textwrap.fill(verified.explained(), 98)}")
        return 0
    if rest not in ([], ["--json"]):
        raise ConfigError(f"env: takes only --json or --models, got {' '.join(rest)}")
    from jaxrlhf import environment

    found = environment.describe()
    if rest:
        import json

        print(json.dumps(found, indent=2))
    else:
        print(printable(environment.text(found)))
    return 0


def help_text(command: str) -> str:
    """Options and keys of one command, with defaults and what they mean."""
    import textwrap

    usage = parser(command)
    operand = "PIPELINE.yaml" if command == "run" else OPERANDS.get(command, ("", ""))[1]
    words = [f"jaxrlhf {command}", operand, "[key.path=value ...]"]
    for action in usage._actions[2:]:
        flag = "|".join(action.option_strings)
        words.append(
            f"[{flag} {action.metavar or action.dest}]" if action.nargs != 0 else f"[{flag}]"
        )
    lines = textwrap.wrap(
        "usage: " + " ".join(w.replace(" ", "\0") for w in words if w), 98, subsequent_indent="    "
    )
    lines = [line.replace("\0", " ") for line in lines]
    if command == "run":
        from jaxrlhf.config import pipeline
        from jaxrlhf.config.stages import PIPELINE_STAGES

        lines += ["", *(pipeline.__doc__ or "").strip().splitlines()]
        lines += ["", f"stages: {', '.join(PIPELINE_STAGES)}"]
        return "\n".join(lines) + "\n"

    from jaxrlhf.config.schema import allows_extra, entries, fields, leaves
    from jaxrlhf.config.stages import STAGES

    section = STAGES[command]
    lines += ["", (section.__doc__ or "").strip(), ""]
    for key, (shape, info) in leaves(section).items():
        lines += key_help(key, shape, info)
    for name, shape in fields(section).items():
        if shape.section is not None and allows_extra(shape.section):
            lines.append(f"  {name}.*".ljust(36) + "parameters of what was chosen: --print-config")
    for entry, keys in entries(section).items():
        example = f"{{{entry.shorthand}: ..., key: value}}"
        lines += ["", f"  an entry of {', '.join(keys)} is {example}, with these keys", ""]
        for key, (shape, info) in leaves(entry).items():
            lines += key_help(key, shape, info)
    return "\n".join(lines) + "\n"


def key_help(key: str, shape: Shape, info: FieldInfo) -> list[str]:
    """The lines of one key: its default, what it means, the names it accepts."""
    import textwrap

    from jaxrlhf.config.python_files import keys_of

    names = shape.choices if len(shape.choices) > 1 else ()
    if shape.table is not None:
        names = keys_of(shape.table.file, shape.table.table)
    about = f"{info.description or ''}" + (f" ({', '.join(map(str, names))})" if names else "")
    head = f"  {key}"
    if not info.is_required():
        head += f" = {default_text(info.get_default(call_default_factory=True))}"
    head = head.ljust(34) + "  "
    return textwrap.wrap(about, 98, initial_indent=head, subsequent_indent=" " * 36)


def default_text(value: Any) -> str:
    """A default as it would be written in YAML."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list):
        return "[" + ", ".join(map(default_text, value)) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {default_text(v)}" for key, v in value.items()) + "}"
    return f"{value:g}" if isinstance(value, float) else str(value)


def printable(text: str) -> str:
    """The text with control characters spelled out: data may hold terminal escapes."""
    return "".join(c if c == "\n" or c.isprintable() else repr(c)[1:-1] for c in text)


def one_screen(text: str) -> str:
    """A message that fits: control characters spelled out, the rest of a long one counted."""
    lines = printable(text).splitlines()
    if len(lines) > MAX_LINES:
        left = len(lines) - MAX_LINES + 1
        lines = [*lines[: MAX_LINES - 1], f"  ... and {left} lines more"]
    return "\n".join(lines)


# A program's temporaries are one allocation of hundreds of MB, made for each call. Huge pages make
# it cheap to map; one arena that is never given back (nor made of mmaps) maps it only once.
MALLOC = "hugetlb=1 arena_max=1 mmap_max=0 trim_threshold=1099511627776"


def use_huge_pages(arguments: list[str]) -> None:
    """Starts this process anew, once, with malloc on huge pages that it keeps: a fifth off a CPU
    step, more on a busy machine.

    glibc reads the setting only when a process starts. JAXRLHF_HUGE_PAGES=0 leaves it alone.
    """
    name, wanted = "GLIBC_TUNABLES", "glibc.malloc.hugetlb"
    tunables = os.environ.get(name, "")
    light = {"-h", "--help", "--print-config", "--dry-run", "env", "report", "data"}
    if (
        not arguments
        or light & set(arguments)
        or not sys.platform.startswith("linux")
        or os.environ.get("JAXRLHF_HUGE_PAGES") == "0"
        or wanted in tunables
    ):
        return
    try:
        version = os.confstr("CS_GNU_LIBC_VERSION") or ""
    except (ValueError, OSError):
        return
    found = re.fullmatch(r"glibc (\d+)\.(\d+).*", version)
    if found is None or (int(found[1]), int(found[2])) < (2, 35):
        return
    settings = [f"glibc.malloc.{setting}" for setting in MALLOC.split()]
    os.environ[name] = ":".join(filter(None, [tunables, *settings]))
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
