"""Configs and command lines: loading, typed overrides, validation, comparison. Knows no component.

    command = cli.Command(name="python -m jaxtrain.main", description="...", examples=("...",), flags=())

    def main(flags: cli.Flags) -> int | None:
        config = flags.load_config()
        ...

    if __name__ == "__main__":
        cli.run(main, command)

Nothing here imports JAX: a mistake on the command line is reported at once. Why not `ml_collections.config_flags` or
`tyro`: docs/design/config.md.
"""

from jaxtrain.cli.command import IMPORT, REQUIRED, Command, Flag, Flags, exit_code, leave, parse_flags, run
from jaxtrain.cli.files import load, run_file
from jaxtrain.cli.kinds import kind_of
from jaxtrain.cli.record import (
    ABSENT,
    BEFORE,
    KIND,
    complete,
    differences,
    format_differences,
    from_json,
    public,
    sealed,
    to_json,
    upgrade,
)
from jaxtrain.cli.shared import (
    JSON,
    SLICES,
    VOCAB_SIZE,
    WORKDIR,
    WORKER,
    parse_worker,
    size,
    table,
    workdir_of,
    write_json,
)
from jaxtrain.cli.tree import check, override
