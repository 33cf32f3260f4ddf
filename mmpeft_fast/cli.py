"""The command line: `mmpeft-fast study | train | plan | profile | average | bench | doctor`,
also as `python -m mmpeft_fast`.

Every sub-command lives in a module with `add_arguments(parser)` and `run(args) -> int`, imported only when called.
"""

import argparse
import importlib
import logging
import sys
from typing import NoReturn

from mmpeft_fast import __version__
from mmpeft_fast.memory_errors import ALLOCATOR, is_out_of_memory
from mmpeft_fast.plugins import load_plugins

# name: (module, one line of help)
COMMANDS = {
    "study": ("mmpeft_fast.study.command", "run the small study of every method and write its report"),
    "train": ("mmpeft_fast.train.command", "fine-tune a multimodal LLM on your own conversations"),
    "plan": ("mmpeft_fast.plan.command", "predict time and memory of a training step, without weights or a device"),
    "profile": ("mmpeft_fast.profiling.command", "run real steps and show where their time and memory go"),
    "average": ("mmpeft_fast.stored.average", "average adapters that were trained apart (federated averaging)"),
    "bench": ("mmpeft_fast.benchmarks", "measure implementations side by side, compare runs, write a report"),
    "doctor": ("mmpeft_fast.doctor", "show versions, devices, and which provider runs each op and why"),
}


class _Parser(argparse.ArgumentParser):
    """argparse whose complaints are one sentence, like every other bad input."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}; see `{self.prog} --help`\n")


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return its exit code.

    Args:
        argv: arguments without the program's name; `sys.argv[1:]` when None.

    Returns:
        0, or what the sub-command returned; 2 for bad input (one sentence on stderr), 130 after Ctrl-C.

    Raises:
        SystemExit: from argparse, for --help, --version and unknown options.
    """
    argv = sys.argv[1:] if argv is None else argv
    # It warns, as HF PEFT imports it, of a kernel that it cannot download; nothing here calls that one.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    try:
        args = _parser(argv).parse_args(argv)
        return args.run(args)
    except KeyboardInterrupt as interrupt:
        print(": ".join(["interrupted", *map(str, interrupt.args)]), file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        if isinstance(error, BrokenPipeError):
            sys.stderr.close()  # the reader of our output went away: nothing more to say, not even at exit
            return 1
        print(f"error: {_sentence(error)}", file=sys.stderr)
        return 2
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        print(f"error: out of memory: {_sentence(error).rpartition(ALLOCATOR)[2]}", file=sys.stderr)
        return 2


def _parser(argv: list[str]) -> argparse.ArgumentParser:
    """The parser; only the sub-command that `argv` names is imported, so that --help is quick."""
    parser = _Parser(
        prog="mmpeft-fast",
        description="Parameter-efficient fine-tuning of multimodal LLMs at the cost of the frozen model.",
        epilog="`mmpeft-fast COMMAND --help` shows a command's options.",
    )
    parser.add_argument("--version", action="version", version=f"mmpeft-fast {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    named = next((word for word in argv if not word.startswith("-")), None)
    for name, (module_name, summary) in COMMANDS.items():
        subparser = commands.add_parser(
            name,
            help=summary,
            description=f"{summary[0].upper()}{summary[1:]}.",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        if name == named:
            load_plugins()
            module = importlib.import_module(module_name)
            module.add_arguments(subparser)
            subparser.set_defaults(run=module.run)
    return parser


def _sentence(error: Exception) -> str:
    """An error as one line; an OSError names its file in front of the system's reason."""
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    else:
        text = str(error) or type(error).__name__
    return " ".join(text.split())


if __name__ == "__main__":
    sys.exit(main())
