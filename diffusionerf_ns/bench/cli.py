"""The command `diffusionerf-bench`."""

import sys

from ddm_training.errors import InputError


def main(args: list[str] | None = None) -> None:
    """Entry point. Mistakes in what the user gives end with a message and exit status 2, without a traceback."""
    import tyro

    from diffusionerf_ns.bench.plot import PlotConfig
    from diffusionerf_ns.bench.run import RunConfig
    from diffusionerf_ns.bench.table import TableConfig

    try:
        commands = {"run": RunConfig, "table": TableConfig, "plot": PlotConfig}
        tyro.extras.subcommand_cli_from_dict(commands, args=args).main()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("stopped; run the same command again to go on", file=sys.stderr)
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
