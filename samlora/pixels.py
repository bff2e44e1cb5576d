"""How an image encoder wants its input, as plain data: bases and systems state it, adapters record it."""

from dataclasses import dataclass

VALUES = ("unit", "sam", "minmax")
RESAMPLING = ("cubic", "bilinear", "area")


@dataclass(frozen=True)
class Pixels:
    """How an image in 0..1 becomes the input of an image encoder.

    values: "unit": 0..1 as they are; "sam": minus SAM's pixel mean, divided by its standard deviation (done inside the
    model); "minmax": the minimum of each resized image becomes 0 and its maximum 1. pad: scaled by the longer side and
    padded to the right and below with the value that the encoder sees as 0; otherwise stretched to the square.
    resampling: "cubic": cubic spline zoom, as SAMed's; "bilinear": with antialiasing, as SAM's; "area": the mean over
    the area of each new pixel, as OpenCV's INTER_AREA.
    """

    values: str = "unit"
    pad: bool = False
    resampling: str = "cubic"


SAMED = Pixels()
SAM = Pixels("sam", pad=True, resampling="bilinear")
MEDSAM = Pixels("minmax")
LITE_MEDSAM = Pixels("minmax", pad=True, resampling="area")
