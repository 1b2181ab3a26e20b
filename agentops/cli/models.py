"""`agentops models`: what is in the catalogue and the cache, and getting a model ready."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from agentops.engine.models import ModelCard
    from agentops.settings import Settings

Json = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")]


def register(app: typer.Typer) -> None:
    models = typer.Typer(
        help="Models: what there is, getting one ready, removing one.", no_args_is_help=True, rich_markup_mode=None
    )
    models.command("list")(list_)
    models.command("prepare")(prepare)
    models.command("show")(show)
    models.command("remove")(remove)
    app.add_typer(models, name="models")


def list_(as_json: Json = False) -> None:
    """List the catalogue and every model in the cache."""
    from agentops.engine.models import list_models

    cards = list_models(_settings({}))
    if as_json:
        return _print_json([_fields(card) for card in cards])
    width = max(len(card.name) for card in cards)
    for card in cards:
        state = f"{card.size_bytes / 1e6:.0f} MB" if card.folder else "not prepared"
        _print(f"{card.name:<{width}}  {card.kind:<8}  {state:<12}  {card.about or card.quantization}")
    return None


def prepare(
    name: Annotated[
        str | None, typer.Argument(help="Catalogue name, hub id or folder; without it, all that a run needs.")
    ] = None,
    offline: Annotated[bool | None, typer.Option("--offline", help="Use what is on this machine only.")] = None,
) -> None:
    """Get a model ready: fetch it, check it, quantize it. A damaged one is prepared anew."""
    from agentops.cli.progress import stages
    from agentops.engine.models import prepare as prepare_model

    settings = _settings({"model.offline": offline})
    for wanted in [name] if name else [settings.model.name, settings.retrieval.embedder]:
        with stages(wanted) as progress:
            folder = prepare_model(wanted, settings, progress, verify=True)
        _print(f"{wanted}: {folder}")
        quality = _card(wanted, settings).report.get("perplexity")
        if quality:
            _print(f"  perplexity {quality['float']:.2f} before, {quality['quantized']:.2f} after ({_ratio(quality):.3f} times)")


def show(
    name: Annotated[
        str | None, typer.Argument(help="Catalogue name, hub id or folder; without it, the model in the settings.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show a model: its size, quantization, revision, source and perplexities."""
    settings = _settings({})
    card = _card(name or settings.model.name, settings)
    if as_json:
        return _print_json(_fields(card))
    source, calibration, quality = (card.report.get(key, {}) for key in ("source", "calibration", "perplexity"))
    lines = {
        "name": card.name,
        "about": card.about,
        "kind": card.kind,
        "folder": str(card.folder) if card.folder else f"not prepared; get it with: agentops models prepare {card.name}",
        "size": f"{card.size_bytes / 1e6:.1f} MB" if card.folder else "",
        "quantization": card.quantization,
        "revision": card.revision,
        "source": " ".join(str(source[key]) for key in ("kind", "repository", "package", "file") if key in source),
        "calibration": f"{calibration['tokens']:,} tokens: {calibration['texts']}" if calibration else "",
        "perplexity": f"{quality['float']:.2f} before, {quality['quantized']:.2f} after ({_ratio(quality):.3f} times)"
        if quality
        else "",
        "measured on": f"{quality['tokens']:,} tokens: {quality['text']}" if quality else "",
        "seconds": ", ".join(f"{stage} {value:g}" for stage, value in card.report.get("seconds", {}).items()),
    }
    for label, value in lines.items():
        if value:
            _print(f"{label:<13} {value}")
    return None


def remove(
    name: Annotated[str, typer.Argument(help="Catalogue name or hub id of a model in the cache.")],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Remove a model from the cache."""
    from agentops.engine.models import remove as remove_model

    settings = _settings({})
    card = _card(name, settings)
    if card.folder and not yes:
        typer.confirm(f"Remove {card.folder} ({card.size_bytes / 1e6:.0f} MB)?", abort=True, err=True)
    _print(f"{name} removed, {remove_model(name, settings) / 1e6:.0f} MB freed")


def _settings(flags: dict[str, Any]) -> Settings:
    from agentops.settings import load_settings

    return load_settings(flags)


def _card(name: str, settings: Settings) -> ModelCard:
    from agentops.engine.models import describe

    return describe(name, settings)


def _ratio(quality: dict[str, Any]) -> float:
    return float(quality["quantized"]) / float(quality["float"])


def _fields(card: ModelCard) -> dict[str, Any]:
    return asdict(card) | {"folder": str(card.folder) if card.folder else None}


def _print(text: str) -> None:
    from agentops.cli.render import clean

    print(clean(text))


def _print_json(value: Any) -> None:
    import json

    print(json.dumps(value, indent=2))
