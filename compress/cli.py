"""The command line. Nothing heavy is imported before a command needs it, so that --help answers at once."""

from __future__ import annotations

import sys
import traceback
from pathlib import Path

import click

from compress import __version__

FORMATS = ("auto", "native", "compressed-tensors", "compress-plan")


class Commands(click.Group):
    """`compress MODEL RECIPE` without naming the command `run`: what is no command is a model."""

    def parse_args(self, context, arguments):
        if arguments and arguments[0] not in {*self.commands, "-h", "--help", "--version"}:
            arguments = ["run", *arguments]
        return super().parse_args(context, arguments)

    def format_usage(self, context, formatter):
        formatter.write_usage("compress", "MODEL RECIPE [OPTIONS]  |  COMMAND [ARGUMENTS]")


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="compress")
def cli():
    """Compress a pretrained model by a recipe into a checkpoint that is smaller, faster and proven.

    MODEL is a hub id or folder of a transformers model, a diffusers model or a whole diffusers pipeline; RECIPE a YAML
    file. A model whose name is also a command's: compress run MODEL RECIPE.
    """


@cli.command()
@click.argument("model")
@click.argument("recipe", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), help="folder to write; default ./<model>-<recipe>")
@click.option("--plan", "only_plan", is_flag=True, help="print what each step takes and predicts, touch nothing")
@click.option("--push", "repo", metavar="REPO", help="put the result on the hub")
@click.option("--private", is_flag=True, help="make a new hub repository private")
@click.option("--device", help="where to work: cpu, cuda, ...")
@click.option("--dtype", help="load the model as float32, bfloat16 or float16; default as it is on disk")
@click.option(
    "--format",
    "form",
    type=click.Choice(FORMATS),
    help="checkpoint format; default the recipe's, else the first that fits",
)
@click.option(
    "--force",
    is_flag=True,
    help="replace OUTPUT or another recipe's unfinished run, emit in spite of missed limits",
)
@click.option("--debug", is_flag=True, help="show the trace of an error")
def run(model, recipe, output, only_plan, repo, private, device, dtype, form, force, debug):
    """Compress MODEL by RECIPE (the command's name may be left out)."""
    from compress.pipeline import compress, plan

    if only_plan:
        from compress.tables import print_plan

        print_plan(plan(model, recipe, dtype=dtype), console())
        return
    hush()
    output = output or Path(f"{(Path(model).resolve() if Path(model).is_dir() else Path(model)).name}-{recipe.stem}")
    result = compress(model, recipe, output=output, device=device, dtype=dtype, format=form, force=force)
    result.report.table(console(), result.folder)
    if repo:
        click.echo(result.push(repo, private=private))


@cli.command()
@click.argument("model")
@click.option("--debug", is_flag=True, help="show the trace of an error")
def inspect(model, debug):
    """What MODEL is made of, and what each family can do to it; reads the config, not the weights."""
    from compress.inspection import inspect
    from compress.tables import print_inspection

    print_inspection(inspect(model), console())


@cli.command()
@click.argument("name", required=False)
@click.option("--debug", is_flag=True, help="show the trace of an error")
def methods(name, debug):
    """All methods with one line each; with NAME its card: options, defaults, when it hurts, paper."""
    from compress.tables import print_card, print_methods

    print_card(name, console()) if name else print_methods(console())


@cli.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--debug", is_flag=True, help="show the trace of an error")
def verify(folder, debug):
    """Reload FOLDER in a fresh process and compare its answers with those of the model that was saved."""
    from compress.errors import CompressError
    from compress.verification import verify

    verified = verify(folder)
    if not verified["passed"]:
        raise CompressError(f"{folder}: {verified['how']}, relative error {verified['error']:.3g}")
    click.echo(f"{folder}: {verified['how']}")


@cli.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--html", is_flag=True, help="write FOLDER/report.html, one page with plots")
@click.option("--debug", is_flag=True, help="show the trace of an error")
def report(folder, html, debug):
    """Print the tables of an emitted FOLDER again."""
    from compress.report import Report

    found = Report.read(folder)
    if html:
        from compress.page import page

        path = folder / "report.html"
        path.write_text(page(found), encoding="utf-8")
        click.echo(path)
    else:
        found.table(console(), folder)


@cli.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.argument("repo")
@click.option("--private", is_flag=True, help="make a new repository private")
@click.option("--pr", is_flag=True, help="open a pull request instead of committing to main")
@click.option("--debug", is_flag=True, help="show the trace of an error")
def push(folder, repo, private, pr, debug):
    """Put an emitted FOLDER on the hub as one commit."""
    from compress.hub import push

    click.echo(push(folder, repo, private=private, pr=pr))


@cli.command()
@click.option("--debug", is_flag=True, help="show the trace of an error")
def schema(debug):
    """Print the JSON schema of recipes, for editors."""
    import json

    from compress.recipe import schema

    click.echo(json.dumps(schema(), indent=2))


def hush() -> None:
    """The libraries' progress bars belong on a terminal, and their advice on casting to us."""
    import diffusers
    import transformers

    diffusers.utils.logging.set_verbosity_error()
    if not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()
        diffusers.utils.logging.disable_progress_bar()


def console():
    """Where tables go; as wide as they need when the output is not a terminal."""
    from rich.console import Console

    return Console() if sys.stdout.isatty() else Console(width=160)


def main(arguments: list[str] | None = None) -> None:
    """Entry point: exit codes 0 done, 2 the user must mend something, 3 a limit was missed, 4 internal."""
    arguments = sys.argv[1:] if arguments is None else arguments
    from compress.errors import CompressError, LimitMissed

    try:
        cli.main(arguments, prog_name="compress", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(2)
    except click.Abort:
        sys.exit(130)
    except CompressError as error:
        show(error, str(error), arguments)
        sys.exit(3 if isinstance(error, LimitMissed) else 2)
    except Exception as error:  # the last line of defence: what we did not foresee is our mistake, and said so
        show(error, f"internal error: {type(error).__name__}: {error} (--debug shows where)", arguments)
        sys.exit(4)


def show(error: Exception, message: str, arguments: list[str]) -> None:
    """One line on stderr; with --debug the trace before it."""
    if "--debug" in arguments:
        traceback.print_exception(error)
    click.echo(message, err=True)


if __name__ == "__main__":
    main()
