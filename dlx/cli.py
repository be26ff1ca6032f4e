"""The command line of every experiment: ``main(Config, build, PRESETS)`` is its last line.

    python -m experiments.NAME [train|eval|summary|sample] [--preset NAME] [--field value ...]

Exit codes: 0 done; 1 the run diverged or the disk is full; 2 bad input, told in one line; 75
stopped on purpose and saved, the same command goes on.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import difflib
import errno
import io
import itertools
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from dlx.errors import BadInput

COMMANDS = ("train", "eval", "summary", "sample")


@dataclasses.dataclass(frozen=True)
class Flags:
    """Where and how to run: nothing here changes a result, so it is no part of a configuration."""

    workdir: str = ""  # the run folder; empty: runs/NAME
    fresh: bool = False  # start over in a folder that is in use
    seeds: str = ""  # several seeds, a folder each: 0..4 or 0,2,5; empty: --seed alone
    mesh: str = ""  # devices, like data=4,fsdp=2; empty: all on the data axis
    coordinator: str = ""  # HOST:PORT of process 0, where there are several; SLURM and pods tell it
    processes: int = 0  # how many there are
    process: int = -1  # which of them this is, from 0
    data_dir: str = ""  # where data sets lie; empty: DLX_DATA_DIR
    split: Literal["validation", "test"] = "validation"  # what `eval` reads
    profile: bool = False  # write a trace of a few steps to the run folder
    debug: bool = False  # tracebacks, and a stop at the first NaN


def main(
    config_class: type,
    build: Callable[[Any], Any],
    presets: Mapping[str, Any],
    args: list[str] | None = None,
) -> None:
    """Runs an experiment from its command line, and exits.

    Args:
      config_class: a frozen dataclass with a field `run: Run`.
      build: configuration -> Experiment, or {phase: (Run, previous state -> Experiment)}. It
        opens no data: that is for `data` and the evaluations to do.
      presets: {name: configuration}; the first is the default.
      args: the arguments; None takes the process's.
    """
    whole_process = args is None
    args = sys.argv[1:] if args is None else args
    try:
        code = _main(config_class, build, presets, args, whole_process)
    except BadInput as e:
        if "--debug" in args:
            raise
        line = f"error: {' '.join(str(e).split())}"
        # The middle gives way: what is wrong comes first, what to do comes last.
        print(line if len(line) < 200 else f"{line[:100]}...{line[-96:]}", file=sys.stderr)
        code = 2
    except FloatingPointError as e:
        if "--debug" in args:
            raise
        print(f"diverged: {e}; lower the learning rate or clip gradients", file=sys.stderr)
        code = 1
    except OSError as e:
        if "--debug" in args or e.errno != errno.ENOSPC:
            raise
        where = f" ({e.filename})" if e.filename else ""
        print(f"error: {e.strerror}{where}: make room, the same command goes on", file=sys.stderr)
        code = 1
    except KeyboardInterrupt:
        code = 75
    sys.stdout.flush()
    sys.exit(code)


def _main(config_class, build, presets, args, whole_process) -> int:
    from dlx import guard, processes

    with guard.signals(whole_process):
        name = _name(build)
        command, config, flags = parse(config_class, presets, args, name)
        _setup(flags)
        folder = Path(flags.workdir or Path("runs") / name)
        asked = {"experiment": name, "command": command, "workdir": str(folder.absolute())}
        asked |= {k: getattr(flags, k) for k in ("seeds", "mesh", "split")}
        processes.alike(guard.flat(asked | dataclasses.asdict(config)))
        seeds = _seeds(flags.seeds)
        for seed in [None] if seeds is None else seeds:
            place, chosen = folder, config
            if seed is not None:
                run = dataclasses.replace(config.run, seed=seed)
                place, chosen = folder / f"seed{seed}", dataclasses.replace(config, run=run)
            COMMAND[command](name, build, chosen, flags, place, _preset(args, presets))
        if command == "train" and seeds is not None and len(seeds) > 1:
            _spread(name, [folder / f"seed{seed}" for seed in seeds])
    return 0


# ---- Parsing -----------------------------------------------------------------------------------


def parse(
    config_class: type, presets: Mapping[str, Any], args: list[str], name: str
) -> tuple[str, Any, Flags]:
    """(command, configuration, flags).

    Raises:
      BadInput: an unknown flag (with the nearest right name), a wrong type or value.
    """
    import tyro

    from dlx.experiment import Run

    prog = f"python -m experiments.{name}"
    preset = _preset(args, presets)
    command, rest = "train", _without_preset(args)
    if rest and not rest[0].startswith("-"):
        command, *rest = rest
        if command not in COMMANDS:
            hint = f": write --{command.replace('=', ' ')}" if "=" in command else ""
            raise BadInput(f"{command!r} is no command{hint or _nearest(command, COMMANDS)}")
    default = presets[preset]
    if command in ("eval", "sample") and not {"-h", "--help"} & set(rest):
        default = _stored(config_class, rest, name) or default
    tyro.conf.configure(tyro.conf.OmitArgPrefixes)(Run)  # --steps, not --run.steps
    bare = tyro.conf.arg(name="")
    fields = [("config", Annotated[config_class, bare]), ("flags", Annotated[Flags, bare])]
    args_class = dataclasses.make_dataclass("Args", fields, frozen=True)
    description = "\n\n".join([
        (config_class.__doc__ or "").strip(),
        f"{prog} [{'|'.join(COMMANDS)}] [--preset {'|'.join(presets)}] [--field value ...]",
        "train (the default) trains, or resumes; eval reads validation, or --split test; summary "
        "counts parameters, bytes and FLOPs; sample shows what the model makes.",
        f"--preset sets the defaults of the fields below; these are those of {preset}.",
    ])  # fmt: skip

    def cli(arguments: list[str]) -> Any:
        return tyro.cli(
            args_class,
            args=arguments,
            default=args_class(default, Flags()),
            prog=f"{prog} {command}",
            description=description,
            config=(tyro.conf.FlagCreatePairsOff,),
        )

    if "-h" in rest or "--help" in rest:
        cli(["--help"])
    parsed = None
    with _captured() as box, contextlib.suppress(SystemExit):
        parsed = cli(rest)
    if parsed is None:
        with _captured() as helped, contextlib.suppress(SystemExit):
            cli(["--help"])
        known = sorted({*re.findall(r"--[\w.-]+", _read(helped)), "--preset"})
        raise BadInput(_one_line(_read(box), rest, known))
    return command, parsed.config, parsed.flags


@contextlib.contextmanager
def _captured() -> Iterator[io.TextIOWrapper]:
    """What tyro prints; in UTF-8, so that its boxes look the same everywhere."""
    text = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True)
    with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
        yield text


def _read(text: io.TextIOWrapper) -> str:
    text.seek(0)
    return text.read()


def _one_line(box: str, args: list[str], known: list[str]) -> str:
    """tyro's box as one line, with the nearest right name for each flag that it does not know."""
    lines = [line.strip("│ ") for line in box.splitlines() if line.startswith("│")]
    blocks = [" ".join(b.split()) for b in re.split(r"\n─+\n", "\n".join(lines))]
    if blocks[0].startswith("Unrecognized options:"):
        words = [w.strip() for w in blocks[0].partition(":")[2].split(", ")]
        unknown = [w for w in words if w.startswith("--")]
        if not unknown:
            return _bare_word(words[0], known)
        return "; ".join(f"unknown flag {w}{_nearest(w, known)}" for w in unknown)[:180]
    if m := re.match(r"Error parsing (--[\w.-]+)", blocks[0]):
        given = next((a for a in args if a.replace("_", "-").partition("=")[0] == m[1]), m[1])
        values = list(itertools.takewhile(lambda a: a[:2] != "--", args[args.index(given) + 1 :]))
        values = [given.partition("=")[2]] if "=" in given else values
        kind = lines[lines.index("Argument helptext:") + 1].partition(" ")[2]
        return f"{m[1]} got {' '.join(values)!r}: give it {kind.removeprefix('{None}|')}"[:180]
    return re.sub(r"\.$", "", blocks[0])[:150] + ": see --help"


def _bare_word(word: str, known: list[str]) -> str:
    if word in COMMANDS:
        return f"{word!r} is a command: it must come first, before the flags"
    key = "--" + word.partition("=")[0].lstrip("-").replace("_", "-")
    if key in known:
        return f"{word!r} is no flag: write {key} {word.partition('=')[2] or 'VALUE'}"
    return f"{word!r} is no flag: flags begin with -- (see --help)"


def _nearest(word: str, known: Any) -> str:
    word = word.partition("=")[0].replace("_", "-")
    # By a part or the initials too: --lr finds --opt.lr and --learning-rate.
    bare = word.lstrip("-")
    near = [k for k in known if bare in (k.split(".")[-1], "".join(re.findall(r"\b\w", k)))]
    near = near or difflib.get_close_matches(word, list(known), 1, 0.5)
    return f": did you mean {near[0]}?" if near else ": see --help"


def _preset(args: list[str], presets: Mapping[str, Any]) -> str:
    given = any(a.partition("=")[0] == "--preset" for a in args)
    preset = _early(args, "--preset") if given else next(iter(presets))
    if preset not in presets:
        raise BadInput(f"preset {preset!r} is unknown: there are {', '.join(presets)}")
    return preset


def _early(args: list[str], flag: str) -> str:
    """The value of a flag that decides on the defaults of the others."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument(flag, default="")
    try:
        return getattr(parser.parse_known_args(args)[0], flag.lstrip("-"))
    except argparse.ArgumentError as e:
        raise BadInput(f"{flag} needs a value") from e


def _without_preset(args: list[str]) -> list[str]:
    out, skip = [], False
    for a in args:
        if not skip and not a.startswith("--preset="):
            if a == "--preset":
                skip = True
                continue
            out.append(a)
        skip = False
    return out


def _stored(config_class: type, args: list[str], name: str) -> Any:
    """The configuration of the run folder that eval and sample read."""
    from dlx import runs

    folder = Path(_early(args, "--workdir") or Path("runs") / name)
    if seeds := _seeds(_early(args, "--seeds")):
        folder /= f"seed{seeds[0]}"
    stored = runs.config_of(folder)
    return runs.structure(stored["config"], config_class, folder / "config.json")


def _seeds(text: str) -> list[int] | None:
    if not text:
        return None
    if m := re.fullmatch(r"(\d+)\.\.(\d+)", text):
        first, last = int(m[1]), int(m[2])
        if first <= last < first + 10_000:
            return list(range(first, last + 1))
    elif re.fullmatch(r"\d+(,\d+)*", text):
        return [int(s) for s in text.split(",")]
    raise BadInput(f"seeds {text!r} cannot be read: write 0..4 or 0,2,5")


def _name(build: Callable[..., Any]) -> str:
    """What the run is called: the experiment's module, or the script."""
    if build.__module__ != "__main__":
        return build.__module__.rpartition(".")[2]
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if spec is not None and spec.name:
        return spec.name.removesuffix(".__main__").rpartition(".")[2]
    return Path(sys.argv[0]).stem or "experiment"


# ---- Commands ----------------------------------------------------------------------------------


def _setup(flags: Flags) -> None:
    """The process's global settings: only the command line makes any."""
    import jax

    from dlx import processes

    processes.start(flags.coordinator, flags.processes, flags.process)
    if jax.distributed.is_initialized() and not processes.first():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(Path(base) / "dlx" / "jax")
    jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)

    def check_data() -> None:
        if flags.data_dir and not Path(flags.data_dir).is_dir():
            raise BadInput(f"data_dir {flags.data_dir!r} is no folder: correct it")

    processes.agreed(check_data)
    if flags.data_dir:
        os.environ["DLX_DATA_DIR"] = flags.data_dir
    if flags.debug:
        jax.config.update("jax_debug_nans", True)


def _mesh(flags: Flags) -> Any:
    """The devices of the run. Those of a CPU compile their programs anew in every process: as the
    cache gives them back (jax 0.10 to 0.12) the collectives within a scan are not in one order on
    all devices, which then wait for each other until XLA ends the process.
    """
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    from dlx import sharding

    mesh = sharding.make_mesh(flags.mesh)
    if mesh.size > 1 and mesh.devices.flat[0].platform == "cpu":
        jax.config.update("jax_enable_compilation_cache", False)
        compilation_cache.reset_cache()  # or what was asked first would hold
    return mesh


def _train(name, build, config, flags, folder, preset) -> None:
    from dlx import guard, loop, processes, runs

    mesh = _mesh(flags)
    whole = _config_dict(name, preset, config)

    def complete() -> bool:
        if flags.fresh or not (folder / "result.json").exists():
            return False
        with guard.lock(folder):
            guard.check_config(folder, whole)
        return True

    if processes.told(complete):
        _say(f"{folder} is complete; --fresh trains it anew")
        _report(name, folder)
        return
    import jax

    _say(f"{name}: preset {preset}, seed {config.run.seed}, {config.run.steps:,} steps on "
                f"{jax.device_count()} x {jax.devices()[0].device_kind}")  # fmt: skip
    cached = jax.config.values["jax_enable_compilation_cache"]
    _say(f"compilation cache: {os.environ['JAX_COMPILATION_CACHE_DIR'] if cached else 'off'}")
    state = None
    parts = runs.phases(build(config), config, folder)
    with contextlib.ExitStack() as stack:

        def take() -> None:
            stack.enter_context(guard.lock(folder))
            guard.check_config(folder, whole, flags.fresh)
            for place, _, _ in parts if flags.fresh else ():  # now: the first phase may die
                with guard.lock(place):
                    guard.check_config(place, whole, fresh=True)

        if len(parts) > 1:  # the phases' common folder is a run folder as well
            processes.told(take)
        for place, run, make in parts:
            if len(parts) > 1:
                _say(f"phase {place.name}: {run.steps:,} steps")
            state, _ = loop.fit(
                make(state), run, workdir=place, config=whole, fresh=flags.fresh,
                given=state, mesh=mesh, profile=flags.profile,
            )  # fmt: skip
        if len(parts) > 1 and processes.first():
            last = parts[-1][0] / "result.json"
            guard.write_json(folder / "result.json", guard.read_json(last))
    _report(name, folder)


def _say(text: str) -> None:
    print(text, flush=True)


def _config_dict(name: str, preset: str, config: Any) -> dict[str, Any]:
    return {"experiment": name, "preset": preset, "config": dataclasses.asdict(config)}


def _report(name: str, folder: Path) -> None:
    """The result, and where everything is."""
    from dlx import guard, processes

    if not processes.first():
        return
    result = guard.read_json(folder / "result.json")
    print(f"{name}: result at step {result['step']} of {result['steps']}, seed {result['seed']}")
    tested = {f"test/{k}": v for k, v in result["test"].items()}
    for key, value in {**result["validation"], **tested}.items():
        print(f"  {key:32} {value:.4f}")
    print(f"everything is in {folder}/ (README.txt says what), pictures in {folder / 'pictures'}/")


def _spread(name: str, folders: list[Path]) -> None:
    """Mean and standard deviation over seeds."""
    import statistics

    from dlx import guard, processes

    if not processes.first():
        return
    results = [guard.read_json(f / "result.json") for f in folders]
    rows = [{**r["validation"], **{f"test/{k}": v for k, v in r["test"].items()}} for r in results]
    print(f"{name}: {len(rows)} seeds")
    for key in rows[0]:
        values = [row[key] for row in rows]
        print(f"  {key:32} {statistics.mean(values):.4f} ± {statistics.stdev(values):.4f}")


def _chosen(name, build, config, flags, folder, preset):
    """(experiment, its state) of a trained run whose configuration is as asked."""
    from dlx import guard, runs

    stored = runs.config_of(folder)
    asked = _config_dict(name, preset, config) | {"preset": stored["preset"]}
    guard.check_config(folder, asked, trained=True)
    mesh = _mesh(flags)
    experiment, state, step = runs.restore(build(config), config, folder, mesh)
    print(f"{folder}: checkpoint of step {step}")
    return experiment, state, mesh


def _eval(name, build, config, flags, folder, preset) -> None:
    import jax

    from dlx import loop

    experiment, state, mesh = _chosen(name, build, config, flags, folder, preset)
    with jax.set_mesh(mesh):
        if flags.split == "validation":
            if not experiment.evals:
                raise BadInput(f"{name} has no validation part, it trains on all: --split test")
            results = loop.evaluate(experiment, state)
        elif experiment.test is None:
            raise BadInput(f"{name} has no test set: leave out --split")
        else:
            results = {f"test/{k}": v for k, v in experiment.test(state).items()}
    for key, value in results.items():
        print(f"  {key:32} {float(value):.4f}")
    print(json.dumps({k: float(v) for k, v in results.items()}))


def _sample(name, build, config, flags, folder, preset) -> None:
    import jax

    from dlx import processes, writers

    experiment, state, mesh = _chosen(name, build, config, flags, folder, preset)
    if experiment.sample is None:
        raise BadInput(f"{name} makes no samples: it is no generative model; use eval")
    with jax.set_mesh(mesh):
        made = experiment.sample(state, jax.random.key(config.run.seed))
    if isinstance(made, str):
        print(made)
    elif processes.first():
        writers.png(folder / "pictures" / "sample.png", made)
        print(f"written to {folder / 'pictures' / 'sample.png'}")


def _summary(name, build, config, flags, folder, preset) -> None:
    import jax

    from dlx import runs, sharding, summary

    mesh = sharding.make_mesh(flags.mesh)
    rows = sharding.rows(mesh)
    state = None
    for place, _, make in runs.phases(build(config), config, folder):
        experiment = make(state)
        batch = next(iter(experiment.data(0, rows))) if experiment.data else {}
        sharding.check_batch(sharding.whole(batch, mesh), mesh)
        print(f"{name}{'' if place == folder else ' ' + place.name}, preset {preset}")
        print(summary.summary(experiment, batch, given=state), end="\n\n")
        state = jax.eval_shape(experiment.init, jax.random.key(0), state)


COMMAND = {"train": _train, "eval": _eval, "summary": _summary, "sample": _sample}
