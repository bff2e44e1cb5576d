"""The options of the page."""

from dataclasses import dataclass

from samlora.errors import InputError
from samlora.options import option


@dataclass(frozen=True)
class AppConfig:
    """All of the page but the image or folder that it opens."""

    adapter: tuple[str, ...] = option((), "adapters to choose from; without one the base alone answers")
    ckpt: str | None = option(
        None, "base weights (default: those of the adapter's variant; without an adapter LiteMedSAM)"
    )
    recipe: str | None = option(
        None, "recipe, for adapters that hold none (SAMed's .pth): a shipped one or a YAML file"
    )
    image_size: int | None = option(
        None, "side of the input of the base alone (default: as it was trained, 1024 for SAM's, 256 for LiteMedSAM)"
    )
    device: str = option("auto", "auto takes a GPU if there is one", ("auto", "cpu", "cuda", "mps"))
    precision: str = option(
        "fp32",
        "number format of the image encoder; auto is bf16 where the device is fast at it",
        ("fp32", "bf16", "fp16", "auto"),
    )
    host: str | None = option(
        None, "address to listen on (default: 127.0.0.1, this machine alone); any other needs the token it prints"
    )
    port: int = option(8000, "port to listen on; 0 for any that is free")
    token: bool = option(False, "ask for a token on this machine too, which others may share")
    open: bool = option(False, "open the page in the browser")
    max_upload_mb: int = option(2048, "most megabytes that one upload may bring")

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise InputError(f"--port {self.port}: 0 to 65535 are possible")
        if self.max_upload_mb < 1:
            raise InputError(f"--max_upload_mb {self.max_upload_mb} is not possible; give 1 or more")
