"""`weightnet serve`: a model behind an HTTP address."""

from typing import Annotated

from cyclopts import Parameter

from weightnet.cli.output import printable, say
from weightnet.errors import MissingDependencyError
from weightnet.serve.limits import Limits


def serve(
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    model: Annotated[list[str] | None, Parameter(negative="", show_default=False)] = None,
    engine: str = "auto",
    device: str = "auto",
    limits: Annotated[Limits | None, Parameter(name="*")] = None,
) -> int:
    """Answer photos over HTTP with predictions, until SIGTERM or Ctrl-C; what is in work then is finished.

    `POST /v1/classify` takes a photo and gives a row of `weightnet predict --json`; `/docs` lists all there is.
    Messages go to standard error. There is no password and no TLS: put a proxy before it where others can reach it.

    Args:
        host: The address to listen on; 0.0.0.0 for all of this machine.
        port: The port to listen on; 0 for a free one, which is named.
        model: A name of `weightnet models`, a run folder, a weights file, or its address; or a file of
            `weightnet export`. Given several times, requests choose by `?model=`, and get the first by default.
        engine: What runs the network: onnxruntime or openvino for a model inside the package and an .onnx file,
            openvino for .xml, executorch for .pte, mnn for .mnn, torch for .pt2 and all that is not exported; auto
            takes the first that fits.
        device: auto or cpu; with torch cuda, cuda:N or mps too, and auto takes a GPU where there is one.
    """
    try:
        from weightnet.serve.server import serve as run
    except ImportError as error:
        raise MissingDependencyError(
            f"The service needs more packages. Got: {error}. Install them by: pip install 'weightnet[serve]'"
        ) from error

    def report(message: str) -> None:
        say(f"weightnet: {printable(message)}")

    run(model or ["default"], host=host, port=port, engine=engine, device=device, limits=limits, report=report)
    return 0
