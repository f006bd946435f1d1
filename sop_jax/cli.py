"""What the commands share: flags parsed with helpful errors, and no traceback for people's errors.

A command defines its flags and calls `run(main)`. It exits with 1 after an error of the run, 2
after one in the command line, 130 when interrupted and 75 when another process, a worker or the
data is lost. One that computes on devices may run as several processes, with `--coordinator`,
`--processes` and `--process`; a process that fails ends the others too.
"""

import errno
import importlib.util
import io
import numbers
import os
import re
import signal
import sys
import textwrap
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NoReturn

from absl import app, flags, logging
from etils import epath
from ml_collections import config_dict, config_flags
from ml_collections.config_flags import config_path

from sop_jax import paths
from sop_jax.config import MAY_BE_EMPTY, PATHS, flatten
from sop_jax.data.named import LOOKED_AT
from sop_jax.errors import LOST, Interrupted, Lost, UserError, nearest

FLAGS = flags.FLAGS

HELP = ("--help", "-help", "-h", "-?", "--helpshort", "--helpfull")
PROCESSES = ("coordinator", "processes", "process")

_FULL_DISK = ("no space left on device", "disk quota exceeded")


def run(main: Callable[[], None], devices: bool = True) -> None:
    """Parses the flags, runs `main` and exits; an error people can mend is one message.

    Among those are a `UserError`, a config file that is missing or does not load, an unknown
    setting or flag, a value of the wrong type, a full disk, and too little memory. Other errors
    keep their traceback.

    Args:
        main: what the command does; prints to stdout in process 0 alone.
        devices: whether it computes on devices, perhaps in several processes; what is compiled
            for them is then kept on disk for the next time.
    """
    if devices:
        flags.DEFINE_string(
            "coordinator", None, "HOST:PORT of process 0, where there are several processes."
        )
        flags.DEFINE_integer(
            "processes", None, "The number of processes; 1 ignores clusters.", lower_bound=1
        )
        flags.DEFINE_integer("process", None, "The number of this process, from 0.", lower_bound=0)

    if isinstance(sys.stdout, io.TextIOWrapper):  # a path that is not UTF-8 is printed as it came
        sys.stdout.reconfigure(errors="surrogateescape")

    def guarded(_: list[str]) -> None:
        signal.signal(signal.SIGTERM, _as_ctrl_c)
        hosts = _hosts()
        try:
            if hosts:
                hosts.start(*_processes())
                hosts.check_agreement(_settings())
                _keep_compiled()
            main()
        except (Exception, KeyboardInterrupt) as error:
            if hosts and hosts.several():
                return _end_among_others(hosts, error)
            message, code = _ending(error)
            if message is None:
                raise
            if hosts and _is_cut_off(error):
                hosts.leave(code, message, message)
            _exit(message, code)
        if hosts:
            hosts.stop()

    app.run(guarded, flags_parser=_parse)


def _as_ctrl_c(number: int, _: Any) -> None:
    signal.signal(number, signal.SIG_DFL)  # a second one ends the command whatever it does
    raise KeyboardInterrupt


class _PathParser(flags.ArgumentParser):
    """Expands paths where they are parsed, so that every command sees the same form of them."""

    def parse(self, argument: str) -> str:
        try:
            return paths.expand(argument)
        except UserError as error:
            raise ValueError(error) from error  # absl adds the name of the flag

    def flag_type(self) -> str:
        return "path"


def define_path(name: str, text: str, required: bool = False, several: bool = False) -> None:
    """Defines a flag whose value is a path, see `paths.expand`.

    Args:
        name: of the flag.
        text: its help.
        required: whether the command needs it.
        several: whether it may be given again; its value is a list of paths, or None.
    """
    serializer: Any = flags.ArgumentSerializer()
    own: Any = {"module_name": sys.argv[0], "required": required}
    if several:
        flags.DEFINE_multi(_PathParser(), serializer, name, None, text, **own)
    else:
        flags.DEFINE(_PathParser(), name, None, text, serializer=serializer, **own)


def define_config() -> None:
    """Defines `--config`, a recipe by its name or file, and `--config.KEY` for its settings."""
    text = "The recipe: its name, such as digits, or a file that defines get_config()."
    config_flags.DEFINE_config_file("config", lock_config=True, help_string=text)
    flags.mark_flag_as_required("config")


def given() -> list[str]:
    """The settings that the command line changes, by their dotted names."""
    return [
        name.removeprefix("config.")
        for name in FLAGS
        if name.startswith("config.") and FLAGS[name].present
    ]


def define_data(**splits: str) -> None:
    """Defines the flags `--data.source`, `--data.path` and `--data.name`, and those of splits.

    Args:
        splits: the help of each setting of `config.data` that names a split.
    """
    own: Any = {"module_name": sys.argv[0]}
    define_path(
        "data.path", "Other data than the run's: a folder, a packed .npz or a TFDS data_dir."
    )
    flags.DEFINE_enum(
        "data.source", None, list(LOOKED_AT), "Its kind; by default what the path is.", **own
    )
    flags.DEFINE_string("data.name", None, "The name of a TFDS data set.", **own)
    for name, text in splits.items():
        flags.DEFINE_string(f"data.{name}", None, text, **own)
    flags.DEFINE_enum(
        "data.orientation", None, ["auto", "exif", "ignore"], "How images are turned.", **own
    )
    flags.DEFINE_float(
        "data.white", None, "White in images of more than 8 bits.", lower_bound=0.0, **own
    )
    flags.DEFINE_integer(
        "data.max_pixels", None, "Larger images are refused.", lower_bound=1, **own
    )
    flags.DEFINE_float(
        *("data.retry_seconds", None, "How long storage that fails is waited for."),
        **own,
        lower_bound=0.0,
    )


def given_data() -> dict[str, Any]:
    """What the flags of `define_data` say, by their names without `data.`."""
    values: dict[str, Any] = {
        name.removeprefix("data."): FLAGS[name].value for name in FLAGS if name.startswith("data.")
    }
    return {name: value for name, value in values.items() if value is not None}


def _help(config: config_dict.ConfigDict | None) -> str:
    """What `--help` shows: what the command does, its flags, and how settings are given."""
    names = [flag.name for flag in FLAGS.get_key_flags_for_module(sys.argv[0])]
    if "config" in FLAGS:
        names = ["config", *(name for name in names if name != "config")]
    names += [name for name in PROCESSES if name in FLAGS]
    lines = [(sys.modules["__main__"].__doc__ or "").strip(), "", "Flags:"]
    for name in names:
        flag = FLAGS[name]
        value = "NAME|FILE" if name == "config" else flag.flag_type().upper()
        notes = "; required" if any("other than None" in x.message for x in flag.validators) else ""
        notes += "" if flag.default in (None, False, "") else f"; default: {flag.default_as_str}"
        written = f"--[no]{name}" if flag.boolean else f"--{name}={value}"
        lines += [f"  {written}{notes}", f"      {flag.help}"]
    if "config" in FLAGS:
        told = (
            "--config.KEY=VALUE changes a setting of the recipe: --config.batch_size=128, "
            "--config.augment.global_scale=0.5,1.0. --config=NAME --help lists the settings of a "
            f"recipe, and {epath.Path(__file__).parent / 'config.py'} says what each means. "
            f"{_known_recipes()}."
        )
        lines += ["", "Settings:", *textwrap.wrap(told, 96, break_on_hyphens=False)]
        for key, value in flatten(config or {}).items():
            lines.append(f"  --config.{key}={tuple(value) if isinstance(value, list) else value}")
    return "\n".join(lines)


def _hosts() -> Any:
    """`parallel.hosts` where the command computes; it loads JAX, which others do not need."""
    if "processes" not in FLAGS:
        return None
    from sop_jax.parallel import hosts

    return hosts


def _keep_compiled() -> None:
    from sop_jax.compiled.cache import keep_compiled  # loads JAX

    keep_compiled()


def _processes() -> list[Any]:
    return [FLAGS[name].value for name in PROCESSES]


def _settings() -> dict[str, Any]:
    """What this command was told: its own flags and the settings of its config, by their names."""
    own = FLAGS.get_key_flags_for_module(sys.argv[0])
    told = {f"--{flag.name}": flag.value for flag in own if flag.name != "config"}
    config = FLAGS["config"].value if "config" in FLAGS else None
    return told | {f"--config.{name}": value for name, value in flatten(config or {}).items()}


def _end_among_others(hosts: Any, error: BaseException) -> None:
    message, code = _ending(error)
    if isinstance(error, Interrupted) and error.together:
        hosts.stop()
        _exit(f"{hosts.name()}: {message}", code)
    text = message or "".join(traceback.format_exception(error))
    words = message or f"{type(error).__name__}: {error}"
    if message is None and _is_lost(error):
        code = LOST
    hosts.leave(code, text, words.removeprefix("error: "))


def _is_cut_off(error: BaseException) -> bool:
    """Whether a signal cut something off at any place, such as XLA's compilation.

    Python's own end may crash then, in what XLA left behind.
    """
    return isinstance(error, KeyboardInterrupt) or (
        isinstance(error, Interrupted) and not error.together
    )


def _is_lost(error: BaseException) -> bool:
    """Whether this is how JAX tells that another process, or the way to it, is gone."""
    wrong_here = ("RESOURCE_EXHAUSTED", "INVALID_ARGUMENT", "UNIMPLEMENTED")
    return type(error).__name__ == "JaxRuntimeError" and not str(error).startswith(wrong_here)


def _ending(error: BaseException) -> tuple[str | None, int]:
    """The message, None for a traceback, and the exit code for what ended a command."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", 130
    if isinstance(error, Interrupted):
        return str(error), 130
    message = _message(error)
    code = LOST if any(isinstance(link, Lost) for link in _chain(error)) else 1
    return (message if message is None else f"error: {message}"), code


def _exit(message: str, code: int) -> NoReturn:
    print(message, file=sys.stderr, flush=True)
    sys.exit(code)


def _parse(argv: Sequence[str]) -> list[str]:
    config = None
    try:
        if "config" in FLAGS:
            argv = _find_recipes(argv)
            config = _load_config(argv)
        if any(flag in HELP for flag in argv[1:]):
            print(_help(config))
            sys.exit(0)
        if config is not None:
            _check_names(argv, config)
        _check_empty(argv, config)
        rest = FLAGS(argv)
        if config is not None:
            _expand_paths(FLAGS["config"].value)
        if hosts := _hosts():
            hosts.check_flags(*_processes())
        if config is not None:
            _check_tuples(flatten(FLAGS["config"].value), flatten(config))
        if rest[1:]:
            raise UserError(
                f"unexpected argument {rest[1]!r}: flags are written --name=value, settings "
                "--config.name=value"
            )
        verbosity = FLAGS["verbosity"]
        if verbosity.using_default_value:  # which app.run would raise to INFO
            verbosity.value, verbosity.using_default_value = logging.WARNING, False
        return rest
    except (UserError, flags.Error) as error:
        _exit(f"error: {_usage(error, config)}", 2)


def recipes() -> epath.Path:
    """The folder of the recipes: beside the package in a checkout, inside it once installed."""
    package = epath.Path(__file__).parent
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


def _recipe_names() -> list[str]:
    return sorted(file.stem for file in recipes().glob("*.py"))


def _known_recipes() -> str:
    return f"Recipes by name, in {recipes()}: {', '.join(_recipe_names())}"


def _find_recipes(argv: Sequence[str]) -> list[str]:
    """The arguments with the path of a file in place of what `--config` names."""
    found = list(argv)
    for i, flag in enumerate(argv):
        if re.match(r"--?config=", flag):
            name, _, value = flag.partition("=")
            found[i] = f"{name}={_find_recipe(value)}"
        elif flag in ("--config", "-config") and i + 1 < len(argv):
            found[i + 1] = _find_recipe(argv[i + 1])
    return found


def _find_recipe(value: str) -> str:
    """The `FILE[:argument]` of a value of `--config`, which may name a recipe for its file."""
    if not value.strip():
        raise _empty("config")
    name, *argument = value.split(":", 1)
    path = os.path.expanduser(name)
    if not os.path.isfile(path):
        recipe = name.removesuffix(".py")
        if recipe not in _recipe_names():
            folder = epath.Path(path).parent
            files = sorted(str(p) for p in folder.glob("*.py")) if folder.is_dir() else []
            like = nearest(path, files) if path.endswith(".py") else ""
            like = like or nearest(epath.Path(path).stem, _recipe_names())
            raise UserError(f"there is no config file {name!r}{like or '.'} {_known_recipes()}")
        path = str(recipes() / f"{recipe}.py")
    return ":".join([path, *argument])


def _load_config(argv: Sequence[str]) -> config_dict.ConfigDict | None:
    """The config of `--config=FILE[:argument]`, loaded apart from absl, whose errors say little."""
    value = None
    for flag, following in zip(argv, [*argv[1:], ""], strict=True):
        match = re.fullmatch(r"--?config(=(.*))?", flag, re.DOTALL)
        if match:
            value = following if match[1] is None else match[2]
    if value is None:
        return None
    path, *argument = value.split(":", 1)
    spec = importlib.util.spec_from_file_location("config", path)
    if spec is None or spec.loader is None:
        raise UserError(f"the config file {path!r} is not a Python file (.py)")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        config = module.get_config(*argument)
    except UserError:
        raise
    except Exception as error:  # whatever a file of the user's raises
        raise UserError(
            f"the config file {path!r} does not load: {type(error).__name__}: {error}"
        ) from error
    if not isinstance(config, config_dict.ConfigDict):
        raise UserError(f"get_config() in {path!r} must return a ConfigDict, not {config!r:.80}")
    return config


def _check_names(argv: Sequence[str], config: config_dict.ConfigDict) -> None:
    known = list(flatten(config))
    for flag in argv:
        match = re.match(r"--?(?:no)?config\.([^=\[]*)", flag)
        if match and match[1] not in known:
            raise UserError(
                f"unknown setting config.{match[1]}{nearest(match[1], known, 'config.')}"
            )


def _check_empty(argv: Sequence[str], config: config_dict.ConfigDict | None) -> None:
    """Refuses empty values, which mostly come from variables that are not set.

    Some settings may be made empty, but only where they are not: there it would say nothing.
    """
    settings = flatten(config or {})
    for flag, following in zip(argv[1:], [*argv[2:], None], strict=False):
        match = re.fullmatch(r"--?([^=]+)(=\s*)?", flag)
        if not match or (match[2] is None and (following is None or following.strip())):
            continue
        name = match[1].removeprefix("config.")
        if name not in MAY_BE_EMPTY or (name != match[1] and not settings.get(name)):
            raise _empty(match[1])


def _empty(name: str) -> UserError:
    return UserError(f"--{name} is empty: give it a value; is a variable not set?")


def _expand_paths(config: config_dict.ConfigDict) -> None:
    """Brings the settings that are paths into the form that flags of paths have."""
    for name, text in flatten(config).items():
        if name in PATHS and text:
            try:
                path = paths.expand(text)
            except UserError as error:
                raise UserError(f"--config.{name}={text}: {error}") from error
            config.update_from_flattened_dict({name: path})


def _check_tuples(given: Mapping[str, Any], file: Mapping[str, Any]) -> None:
    """Checks what absl does not: it takes any word for a tuple, of numbers too."""
    for name, example in file.items():
        if isinstance(example, list):
            kind = str if any(isinstance(item, str) for item in example) else numbers.Real
            if not all(isinstance(item, kind) for item in given[name]):
                raise UserError(_wrong_type(name, "tuple", tuple(example), tuple(given[name])))


def _wrong_type(name: str, kind: str, example: Any, given: Any) -> str:
    such_as = "" if example is None else f", such as {example!r}"
    return f"config.{name} must be of type {kind}{such_as}, not {given!r}"


def _usage(error: Exception, config: config_dict.ConfigDict | None) -> str:
    """An error of the command line in words that name the flag, its type and an example."""
    text = str(error)
    if match := re.match(r"flag --(\S+)=None: .* other than None", text):
        if match[1] == "config":
            return f"--config is required: give --config=NAME or FILE. {_known_recipes()}"
        return f"--{match[1]} is required: give --{match[1]}=value"
    match = re.match(r"flag --config\.([^=]+)=(.*?): ", text, re.DOTALL)
    if match and config is not None:
        kind = config_path.get_type(match[1], config).__name__
        example = config_path.get_value(match[1], config)
        return _wrong_type(match[1], kind, example, match[2])
    return text.removeprefix("flag ")


def _message(error: BaseException) -> str | None:
    """The message for an error that people can mend; None for one that is the program's."""
    chain = list(_chain(error))
    for link in chain:
        if isinstance(link, UserError):
            return str(link)
    if any(_is_full_disk(link) for link in chain):
        place = next((name for name in ("out", "workdir") if name in FLAGS), None)
        where = f"writing to {FLAGS[place].value}" if place else "writing"
        then = ": it goes on from the last good checkpoint" if place == "workdir" else ""
        return (
            f"the disk is full: no space was left while {where}. Free some space and run the same "
            f"command again{then}."
        )
    if reason := next((str(link) for link in chain if _is_out_of_memory(link)), None):
        first = re.sub(r"^RESOURCE_EXHAUSTED:? *", "", reason.strip()).splitlines() or [""]
        return f"out of memory{': ' * bool(first[0])}{first[0].rstrip('.')}. {_less_memory()}"
    return None


def _less_memory() -> str:
    """What makes a command that computes take less memory."""
    if "config" in FLAGS:
        return (
            "If it came in a step, raise --config.accumulate (microbatches of a step), which a "
            "resumed run may do too, or lower --config.batch_size; if in an evaluation, lower "
            "--config.eval.batch_size. --config.model.remat=full takes less as well."
        )
    if "batch_size" in FLAGS:
        return "Lower --batch_size, the images that are computed at a time."
    return "Free some memory, or use a machine or a device with more."


def _chain(error: BaseException) -> Iterator[BaseException]:
    yield error
    following = error.__cause__ or error.__context__
    if following is not None:
        yield from _chain(following)


def _is_out_of_memory(error: BaseException) -> bool:
    of_jax = type(error).__name__ in ("JaxRuntimeError", "XlaRuntimeError")
    return isinstance(error, MemoryError) or (of_jax and "RESOURCE_EXHAUSTED" in str(error))


def _is_full_disk(error: BaseException) -> bool:
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    return any(text in str(error).lower() for text in _FULL_DISK)  # as TensorStore reports it
