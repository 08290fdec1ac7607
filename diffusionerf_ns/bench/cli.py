"""The command `diffusionerf-bench`."""

from ddm_training.errors import ends_plainly


def main(args: list[str] | None = None) -> None:
    """Entry point. Mistakes in what the user gives end with a message and exit status 2, without a traceback."""
    import tyro

    from diffusionerf_ns.bench.plot import PlotConfig
    from diffusionerf_ns.bench.run import RunConfig
    from diffusionerf_ns.bench.table import TableConfig

    commands = {"run": RunConfig, "table": TableConfig, "plot": PlotConfig}
    with ends_plainly(at_ctrl_c="stopped; run the same command again to go on"):
        tyro.extras.subcommand_cli_from_dict(commands, args=args).main()


if __name__ == "__main__":
    main()
