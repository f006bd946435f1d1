"""What all commands share: parsing flags, and reporting errors without a traceback.

A command defines its flags and calls `run(main)`. It exits with code 1 after an error of the run, 2
after an error in the command line, 130 if it was interrupted, and 75 if another process, a worker
or the data was lost. A command that computes on devices can run as several processes, with
`--coordinator`, `--processes` and `--process`; if one of them fails, the others end too.
"""

import importlib.util
import io
import numbers
import os
import re
import signal
import sys
import textwrap
import traceback
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

from absl import app, flags, logging
from etils import epath
from ml_collections import config_dict, config_flags
from ml_collections.config_flags import config_path

from sop_jax import paths
from sop_jax.data.named import LOOKED_AT
from sop_jax.errors import LOST, Interrupted, Lost, UserError, chain, is_full_disk, nearest
from sop_jax.settings import MAY_BE_EMPTY, PATHS, flatten
from sop_jax.signals import sent_again

FLAGS = flags.FLAGS

HELP = ("--help", "-help", "-h", "-?", "--helpshort", "--helpfull")
PROCESSES = ("coordinator", "processes", "process")
MAIN_FLAGS = 5  # `--help` lists so many first: a command defines the flags that matter most first

_STANDS_FOR: dict[str, str] = {}  # recipes by the flag that stands for one, see `define_config`
_SETTINGS: dict[str, config_dict.ConfigDict] = {}  # the defaults of `define_settings`, by section


def run(main: Callable[[], None], devices: bool = True, more: str | None = None) -> None:
    """Parses the flags, runs `main` and exits; an error that the user can fix is one message.

    These errors are a `UserError`, a config file that is missing or does not load, an unknown
    setting or flag, a value of the wrong type, a full disk, and too little memory. Other errors
    keep their traceback.

    Args:
        main: does the work of the command; it prints to stdout only in process 0.
        devices: whether the command computes on devices, possibly in several processes. If so, its
            compiled programs are cached on disk.
        more: the name of a flag that can be repeated, of which arguments without a flag are
            further values.
    """
    if devices:
        flags.DEFINE_string(
            "coordinator", None, "HOST:PORT of process 0, if there are several processes."
        )
        flags.DEFINE_integer(
            "processes", None, "The number of processes; 1 ignores clusters.", lower_bound=1
        )
        flags.DEFINE_integer("process", None, "The number of this process, from 0.", lower_bound=0)

    if isinstance(sys.stdout, io.TextIOWrapper):  # prints paths that are not UTF-8 byte for byte
        sys.stdout.reconfigure(errors="surrogateescape")

    def guarded(_: list[str]) -> None:
        signal.signal(signal.SIGTERM, _interrupt)
        # By default since `sop_jax` was imported, but ignored in the background of a shell script.
        if signal.getsignal(signal.SIGINT) in (signal.SIG_DFL, signal.default_int_handler):
            signal.signal(signal.SIGINT, _interrupt)
        hosts = _hosts()
        try:
            if hosts:
                hosts.start(*_processes())
                hosts.check_agreement(_settings())
                _keep_compiled()
            main()
            if hosts:
                hosts.stop()
        except (Exception, KeyboardInterrupt) as error:
            if hosts and hosts.several():
                return _end_among_others(hosts, error)
            message, code = _message_and_code(error)
            if message is None:
                raise
            if hosts and _is_abrupt(error):
                hosts.leave(code, message, message)
            _exit(message, code)
        _end_at_signals(0)

    app.run(guarded, flags_parser=lambda argv: _parse(argv, more))


def _interrupt(number: int, frame: types.FrameType | None) -> None:
    """Raises KeyboardInterrupt; a second signal of the same kind ends the command at once."""
    if not sent_again(number, frame):
        signal.signal(number, signal.SIG_DFL)
        raise KeyboardInterrupt


def several_paths(values: Sequence[str] | None) -> list[str]:
    """Returns the paths of a flag that can be repeated, or separated by commas."""
    found: list[str] = []
    for value in values or ():
        parts = [value] if epath.Path(value).exists() else value.split(",")
        found += [paths.expand(part) for part in parts]
    return found


class _PathParser(flags.ArgumentParser):
    """Expands paths when they are parsed, so that all commands see the same form of a path."""

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
        name: the name of the flag.
        text: the help of the flag.
        required: whether the flag must be given.
        several: whether the flag can be repeated; its value is then a list of paths, or None.
    """
    serializer: Any = flags.ArgumentSerializer()
    own: Any = {"module_name": sys.argv[0], "required": required}
    if several:
        flags.DEFINE_multi(_PathParser(), serializer, name, None, text, **own)
    else:
        flags.DEFINE(_PathParser(), name, None, text, serializer=serializer, **own)


def define_config(**instead: str) -> None:
    """Defines `--config`, which names a recipe or a file, and `--config.KEY` for its settings.

    Args:
        **instead: flags that stand for a recipe, so that no `--config` is needed with them, and the
            name of that recipe.
    """
    _STANDS_FOR.update(instead)
    text = "The recipe: its name, such as digits, or a file that defines get_config()."
    config_flags.DEFINE_config_file("config", lock_config=True, help_string=text)
    flags.mark_flag_as_required("config")


def define_settings(section: str, settings: config_dict.ConfigDict) -> None:
    """Defines `--SECTION.KEY` for settings that do not come from a recipe.

    Args:
        section: the first part of the names, such as eval.
        settings: the settings with their defaults.
    """
    _SETTINGS[section] = config_dict.ConfigDict(settings)
    try:  # before absl does, with a traceback
        _check_names(sys.argv, settings, section)
    except UserError as error:
        _exit(f"error: {error}", 2)
    config_flags.DEFINE_config_dict(section, settings, lock_config=True)


def given(section: str = "config") -> list[str]:
    """Returns the dotted names of the settings that are given on the command line.

    ml_collections defines flags only for these. An empty tuple does not count as `present`.
    """
    prefix = f"{section}."
    return [name.removeprefix(prefix) for name in FLAGS if name.startswith(prefix)]


def define_data(**splits: str) -> None:
    """Defines the flags that select data and say how it is read, which begin with `--data.`.

    Args:
        **splits: the settings of `config.data` that name a split, and the help of each.
    """
    own: Any = {"module_name": sys.argv[0]}
    define_path(
        "data.path", "Data other than the run's: a folder, a packed .npz file or a TFDS data_dir."
    )
    flags.DEFINE_enum(
        "data.source", None, list(LOOKED_AT), "Its kind; by default inferred from the path.", **own
    )
    flags.DEFINE_string("data.name", None, "The name of a TFDS data set.", **own)
    for name, text in splits.items():
        flags.DEFINE_string(f"data.{name}", None, text, **own)
    flags.DEFINE_enum(
        "data.orientation", None, ["auto", "exif", "ignore"], "How images are rotated.", **own
    )
    flags.DEFINE_float(
        "data.white", None, "White of a channel of more than 8 bits.", lower_bound=0.0, **own
    )
    flags.DEFINE_integer(
        "data.max_pixels", None, "Larger images are refused.", lower_bound=1, **own
    )
    flags.DEFINE_float(
        *("data.retry_seconds", None, "How long failing storage is retried, in seconds."),
        **own,
        lower_bound=0.0,
    )


def given_data() -> dict[str, Any]:
    """Returns the flags of `define_data` that are given, by their names without `data.`."""
    values: dict[str, Any] = {
        name.removeprefix("data."): FLAGS[name].value for name in FLAGS if name.startswith("data.")
    }
    return {name: value for name, value in values.items() if value is not None}


def _help(config: config_dict.ConfigDict | None) -> str:
    """Returns the text of `--help`: what the command does, its flags, and how to give settings."""
    names = [flag.name for flag in FLAGS.get_key_flags_for_module(sys.argv[0])]
    if "config" in FLAGS:
        names = ["config", *(name for name in names if name != "config")]
    names += [name for name in PROCESSES if name in FLAGS]
    lines = [_wrapped((sys.modules["__main__"].__doc__ or "").strip())]
    for i, name in enumerate(names):
        if i in (0, MAIN_FLAGS):
            lines += ["", "More flags:" if i else "Flags:"]
        lines += _help_of_flag(name)
    if "config" in FLAGS:
        text = (
            "--config.KEY=VALUE changes a setting of the recipe: --config.batch_size=128, "
            "--config.augment.global_scale=0.5,1.0. --config=NAME --help lists the settings of a "
            f"recipe, and {epath.Path(__file__).parent / 'config.py'} and "
            f"docs/settings.md describe them. {_known_recipes()}."
        )
        lines += ["", "Settings:", *textwrap.wrap(text, 96, break_on_hyphens=False)]
        for key, value in flatten(config or {}).items():
            lines.append(f"  --config.{key}={tuple(value) if isinstance(value, list) else value}")
    for section, settings in _SETTINGS.items():
        lines += ["", "Settings:"]
        for key, value in flatten(settings).items():
            shown = tuple(value) if isinstance(value, list) else value
            lines.append(f"  --{section}.{key}={'' if shown is None else shown}")
    return "\n".join(lines)


def _help_of_flag(name: str) -> list[str]:
    """Returns the lines of `--help` about a flag: its values, its default and its meaning."""
    flag = FLAGS[name]
    if name == "config":
        value = "NAME|FILE"
    elif isinstance(flag, flags.EnumFlag):
        value = "|".join(flag.parser.enum_values)
    elif isinstance(flag.parser, flags.ListParser):
        value = "A,B,..."
    else:
        value = flag.parser.flag_type().upper()
    text = flag.help.partition(">: ")[2] if isinstance(flag, flags.EnumFlag) else flag.help
    if isinstance(flag, flags.MultiFlag):  # absl adds that it can be repeated
        text = text.partition(";\n")[0]
    notes = "; required" if any("other than None" in x.message for x in flag.validators) else ""
    if flag.boolean:
        notes += "; on by default" if flag.default else ""
    elif flag.default not in (None, ""):
        default = str(flag.default_as_str).strip("'")
        notes += f"; default: {default}"
    written = f"--[no]{name}" if flag.boolean else f"--{name}={value}"
    return [
        f"  {written}{notes}",
        *textwrap.wrap(text, 96, initial_indent=6 * " ", subsequent_indent=6 * " "),
    ]


def _wrapped(text: str) -> str:
    """Returns a text with its long lines wrapped, and others as they are."""
    lines = [textwrap.wrap(line, 100) if len(line) > 100 else [line] for line in text.splitlines()]
    return "\n".join(part for parts in lines for part in parts)


def _hosts() -> Any:
    """Returns `parallel.hosts` if the command computes; otherwise None, to avoid importing JAX."""
    if "processes" not in FLAGS:
        return None
    from sop_jax.parallel import hosts

    return hosts


def _keep_compiled() -> None:
    from sop_jax.compiled.cache import keep_compiled  # imports JAX

    keep_compiled()


def _processes() -> list[Any]:
    return [FLAGS[name].value for name in PROCESSES]


def _settings() -> dict[str, Any]:
    """Returns the flags of this command and the settings of its config, by their names."""
    own = FLAGS.get_key_flags_for_module(sys.argv[0])
    values = {f"--{flag.name}": flag.value for flag in own if flag.name != "config"}
    for section in ("config", *_SETTINGS):
        if section in FLAGS:
            settings = flatten(FLAGS[section].value or {})
            values |= {f"--{section}.{name}": value for name, value in settings.items()}
    return values


def _end_among_others(hosts: Any, error: BaseException) -> None:
    """Ends a process of several; unless all were interrupted together, it ends the others too."""
    message, code = _message_and_code(error)
    if isinstance(error, Interrupted) and error.together:
        hosts.stop()
        _exit(f"{hosts.name()}: {message}", code)
    text = message or "".join(traceback.format_exception(error))
    words = message or f"{type(error).__name__}: {error}"
    if message is None and _is_lost(error):
        code = LOST
    hosts.leave(code, text, words.removeprefix("error: "))


def _is_abrupt(error: BaseException) -> bool:
    """Returns whether a signal interrupted the command at any point, such as while XLA compiles.

    Python's normal exit may then crash in what XLA left unfinished.
    """
    return isinstance(error, KeyboardInterrupt) or (
        isinstance(error, Interrupted) and not error.together
    )


def _is_lost(error: BaseException) -> bool:
    """Returns whether JAX reports that another process, or the connection to it, was lost."""
    local = ("RESOURCE_EXHAUSTED", "INVALID_ARGUMENT", "UNIMPLEMENTED")
    return type(error).__name__ == "JaxRuntimeError" and not str(error).startswith(local)


def _message_and_code(error: BaseException) -> tuple[str | None, int]:
    """Returns the message for an error, None if it needs a traceback, and the exit code."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", 130
    if isinstance(error, Interrupted):
        return str(error), 130
    message = _message(error)
    code = LOST if any(isinstance(link, Lost) for link in chain(error)) else 1
    return (message if message is None else f"error: {message}"), code


def _exit(message: str, code: int) -> NoReturn:
    print(message, file=sys.stderr, flush=True)
    _end_at_signals(code)
    sys.exit(code)


def _end_at_signals(code: int) -> None:
    """Lets signals end the command at once: its work is done, and Python only tidies up.

    Otherwise each Ctrl-C in what libraries do at exit would print a traceback.
    """
    sys.stdout.flush()
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) == _interrupt:
            signal.signal(number, lambda *_: os._exit(code))


def _parse(argv: Sequence[str], more: str | None) -> list[str]:
    config, sections = None, _SETTINGS
    try:
        if "config" in FLAGS:
            argv = _find_recipes(_with_recipe(argv))
            config = _load_config(argv)
        if any(flag in HELP for flag in argv[1:]):
            print(_help(config))
            sys.exit(0)
        sections = _SETTINGS if config is None else {"config": config, **_SETTINGS}
        for section, settings in sections.items():
            _check_names(argv, settings, section)
        _check_empty(argv, config)
        rest = FLAGS(argv)
        if more is not None and rest[1:]:
            FLAGS[more].parse(rest[1:])
            del rest[1:]
        if config is not None:
            _expand_paths(FLAGS["config"].value)
        if hosts := _hosts():
            hosts.check_flags(*_processes())
        for section, settings in sections.items():
            _split_words(FLAGS[section].value, flatten(settings))
            _check_tuples(flatten(FLAGS[section].value), flatten(settings), section)
        if rest[1:]:
            raise UserError(
                f"unexpected argument {rest[1]!r}: flags are written --name=value, settings "
                "--config.name=value"
            )
        verbosity = FLAGS["verbosity"]
        if verbosity.using_default_value:  # otherwise app.run would set it to INFO
            verbosity.value, verbosity.using_default_value = logging.WARNING, False
        return rest
    except (UserError, flags.Error) as error:
        _exit(f"error: {_usage(error, sections)}", 2)


def recipes() -> epath.Path:
    """Returns the folder of the recipes: next to the package in a checkout, or else inside it."""
    package = epath.Path(__file__).parent
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


def _recipe_names() -> list[str]:
    return sorted(file.stem for file in recipes().glob("*.py"))


def _known_recipes() -> str:
    return f"Recipes by name, in {recipes()}: {', '.join(_recipe_names())}"


def _with_recipe(argv: Sequence[str]) -> list[str]:
    """Returns the arguments, with the `--config` that a flag stands for.

    Raises:
        UserError: another `--config` is given too.
    """

    def has(name: str) -> bool:
        return any(re.match(rf"--?{name}(=|$)", flag) for flag in argv[1:])

    for name, recipe in _STANDS_FOR.items():
        if has(name) and has("config"):
            raise UserError(
                f"--{name} and --config are both given, but --{name} chooses the settings that "
                f"--config would name; leave one of them out. --{name} with --config.KEY=VALUE "
                "keeps single settings, and --config with --config.data.path=FOLDER trains a "
                "recipe on a folder"
            )
        if has(name):
            return [argv[0], f"--config={recipe}", *argv[1:]]
    return list(argv)


def _find_recipes(argv: Sequence[str]) -> list[str]:
    """Returns the arguments, with the value of `--config` replaced by the path of a file."""
    found = list(argv)
    for i, flag in enumerate(argv):
        if re.match(r"--?config=", flag):
            name, _, value = flag.partition("=")
            found[i] = f"{name}={_find_recipe(value)}"
        elif flag in ("--config", "-config") and i + 1 < len(argv):
            found[i + 1] = _find_recipe(argv[i + 1])
    return found


def _find_recipe(value: str) -> str:
    """Returns `FILE[:argument]` for a value of `--config`, which may name a recipe or a file."""
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
    """Loads the config of `--config=FILE[:argument]`, with clearer errors than absl's."""
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
    except Exception as error:  # the file of a user can raise anything
        raise UserError(
            f"the config file {path!r} does not load: {type(error).__name__}: {error}"
        ) from error
    if not isinstance(config, config_dict.ConfigDict):
        raise UserError(f"get_config() in {path!r} must return a ConfigDict, not {config!r:.80}")
    return config


def _check_names(argv: Sequence[str], config: config_dict.ConfigDict, section: str) -> None:
    known = list(flatten(config))
    for flag in argv:
        match = re.match(rf"--?(?:no)?{section}\.([^=\[]*)", flag)
        if not match or match[1] in known:
            continue
        if within := [name for name in known if name.startswith(f"{match[1]}.")]:
            raise UserError(
                f"{section}.{match[1]} is a section of settings; set one of them, such as "
                f"--{section}.{within[0]}"
            )
        like = nearest(match[1], known, f"{section}.")
        raise UserError(f"unknown setting {section}.{match[1]}{like}")


def _check_empty(argv: Sequence[str], config: config_dict.ConfigDict | None) -> None:
    """Refuses empty values, which mostly come from shell variables that are not set.

    The settings in MAY_BE_EMPTY can be emptied, but only if the recipe has a value for them:
    otherwise an empty value would change nothing.
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
    return UserError(f"--{name} is empty; give it a value (is a shell variable not set?)")


def _expand_paths(config: config_dict.ConfigDict) -> None:
    """Expands the settings that are paths, as the flags that are paths are expanded."""
    for name, text in flatten(config).items():
        if name in PATHS and text:
            try:
                path = paths.expand(text)
            except UserError as error:
                raise UserError(f"--config.{name}={text}: {error}") from error
            config.update_from_flattened_dict({name: path})


def _split_words(given: config_dict.ConfigDict, file: Mapping[str, Any]) -> None:
    """Splits lists of words at commas; absl does so for numbers only."""
    for name, value in flatten(given).items():
        of_words = isinstance(file[name], list) and any(isinstance(x, str) for x in file[name])
        if of_words and len(value) == 1 and isinstance(value[0], str):
            words = tuple(word.strip() for word in value[0].split(","))
            given.update_from_flattened_dict({name: words})


def _check_tuples(given: Mapping[str, Any], file: Mapping[str, Any], section: str) -> None:
    """Checks the items of tuples, which absl does not: it accepts any words as a tuple."""
    for name, example in file.items():
        if isinstance(example, list):
            kind = str if any(isinstance(item, str) for item in example) else numbers.Real
            if not all(isinstance(item, kind) for item in given[name]):
                own = f"{section}.{name}"
                raise UserError(_wrong_type(own, "tuple", tuple(example), tuple(given[name])))


def _wrong_type(name: str, kind: str, example: Any, given: Any) -> str:
    such_as = "" if example is None else f", such as {example!r}"
    return f"{name} must be of type {kind}{such_as}, not {given!r}"


def _usage(error: Exception, sections: Mapping[str, config_dict.ConfigDict]) -> str:
    """Returns the message for an error of the command line: the flag, its type and an example."""
    text = str(error)
    if match := re.match(r"flag --(\S+)=None: .* other than None", text):
        if match[1] == "config":
            others = "".join(f", or --{name}=..." for name in _STANDS_FOR)
            return f"--config is required: give --config=NAME or FILE{others}. {_known_recipes()}"
        return f"--{match[1]} is required: give --{match[1]}=value"
    for section, settings in sections.items():
        match = re.match(rf"flag --{section}\.([^=]+)=(.*?): ", text, re.DOTALL)
        if match:
            kind = config_path.get_type(match[1], settings).__name__
            example = config_path.get_value(match[1], settings)
            return _wrong_type(f"{section}.{match[1]}", kind, example, match[2])
    return text.removeprefix("flag ")


def _message(error: BaseException) -> str | None:
    """Returns the message for an error that the user can fix, or None for one of the program."""
    links = list(chain(error))
    for link in links:
        if isinstance(link, UserError):
            return str(link)
    if is_full_disk(error):
        place = next((name for name in ("out", "workdir") if name in FLAGS), None)
        where = f"writing to {FLAGS[place].value}" if place else "writing"
        then = ", which resumes from the last good checkpoint" if place == "workdir" else ""
        return (
            f"the disk is full: no space was left while {where}. Free some space and run the same "
            f"command again{then}."
        )
    if reason := next((str(link) for link in links if _is_out_of_memory(link)), None):
        first = re.sub(r"^RESOURCE_EXHAUSTED:? *", "", reason.strip()).splitlines() or [""]
        return f"out of memory{': ' * bool(first[0])}{first[0].rstrip('.')}. {_less_memory()}"
    return None


def _less_memory() -> str:
    """Returns the advice on how this command can use less memory."""
    if "config" in FLAGS:
        return (
            "If this happened in a step, increase --config.accumulate (the microbatches per step), "
            "which is possible in a resumed run too, or decrease --config.batch_size; if in an "
            "evaluation, decrease --config.eval.batch_size. --config.model.remat=full also saves "
            "memory."
        )
    if "batch_size" in FLAGS:
        return "Decrease --batch_size, the number of images per batch."
    return "Free some memory, or use a machine or a device with more memory."


def _is_out_of_memory(error: BaseException) -> bool:
    of_jax = type(error).__name__ in ("JaxRuntimeError", "XlaRuntimeError")
    return isinstance(error, MemoryError) or (of_jax and "RESOURCE_EXHAUSTED" in str(error))
