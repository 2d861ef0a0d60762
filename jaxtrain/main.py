"""`python -m jaxtrain.main`: flags, environment, exit codes."""

import contextlib
import os
import signal


def _stop_at_once(number: int, frame: object) -> None:
    """Handles signals before the first step is taken; consensus.StopRequest then takes over.

    Does not raise: an exception is lost if the interpreter is in a callback, for example of the garbage collector.
    """
    with contextlib.suppress(OSError):  # the terminal may be gone
        os.write(2, b"\nStopped: no step is under way, so there is nothing to save.\n")
    os._exit(75)


if __name__ == "__main__":
    # Before the other imports, which take 0.3 s: signals end the process with 130 or 143 only during the interpreter's
    # own start (20 ms). `nohup` ignores SIGHUP, and that stays so.
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # asks for a profile once steps are taken
    for _number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if _number != signal.SIGHUP or signal.getsignal(_number) != signal.SIG_IGN:
            signal.signal(_number, _stop_at_once)

from jaxtrain import cli  # noqa: E402
from jaxtrain.cli.redaction import redact_logs  # noqa: E402
from jaxtrain.errors import UserError  # noqa: E402

COMMAND = cli.Command(
    name="python -m jaxtrain.main",
    description="Trains a language model from a config. Run the same command again to resume.",
    examples=(
        "python -m jaxtrain.main --config=configs/quickstart.py",
        "python -m jaxtrain.main --config=configs/1b.py --workdir=runs/1b --config.optimizer.learning_rate=2e-4",
        "python -m jaxtrain.main --config=configs/pretrain.py:small --dry_run",
    ),
    flags=(
        cli.Flag(
            name="workdir",
            type=str | None,
            default=None,
            help="where checkpoints, metrics and caches go, also gs:// or s3://; default: runs/<config file>[-<arg>]",
        ),
        cli.Flag(
            name="dry_run",
            type=bool,
            default=False,
            help="resolve the data, compile every stage, read one batch, print the plan; train nothing",
        ),
        cli.Flag(
            name="profile",
            type=str | None,
            default=None,
            help="STEP:COUNT: write an XProf trace of COUNT steps from STEP on to the work directory's profile/",
        ),
        cli.Flag(
            name="coordinator",
            type=str | None,
            default=None,
            help="HOST:PORT of process 0, if no launcher or cluster sets it; with --num_processes and --process_id",
        ),
        cli.Flag(name="num_processes", type=int | None, default=None, help="how many processes run this command"),
        cli.Flag(name="process_id", type=int | None, default=None, help="the number of this process: 0, 1, ..."),
    ),
    resumes=True,
)


# Kept until the process ends, which must not wait for readers: see loop.run.
_kept: list[object] = []


def main(flags: cli.Flags) -> int:
    workdir = cli.workdir_of(flags)
    # The variables that launchers set.
    for name, value in (
        ("JAX_COORDINATOR_ADDRESS", flags.coordinator),
        ("JAX_NUM_PROCESSES", flags.num_processes),
        ("JAX_PROCESS_ID", flags.process_id),
    ):
        if value is not None:
            os.environ[name] = str(value)
    profile = _profile(flags.profile)
    config = flags.load_config()
    # Importing JAX takes seconds, so check the config first.
    from jaxtrain.trainer import loop

    return loop.run(config, workdir, flags.dry_run, _kept, profile)


def _profile(text: str | None) -> tuple[int, int] | None:
    """The first step and the number of steps of --profile."""
    if text is None:
        return None
    step, _, count = text.partition(":")
    if not (step.isdecimal() and count.isdecimal() and int(step) and int(count)):
        raise UserError(f"--profile={text}: give the first step and the number of steps, for example 100:5")
    return int(step), int(count)


def exit_code(argv: list[str] | None = None) -> int:
    """Runs the command. Returns 0, 2 (the user must change something), 75 (stopped and saved) or 1 (anything else)."""
    return cli.exit_code(main, COMMAND, argv)


if __name__ == "__main__":
    redact_logs()
    cli.leave(exit_code())
