"""Exceptions raised by ptxemu."""


class PtxError(Exception):
    """Base class of everything raised on purpose by this package."""


class ParseError(PtxError):
    """The PTX text could not be understood."""


class Unsupported(PtxError):
    """The PTX uses an instruction or a form of it that is not implemented."""


class ToolMissing(PtxError):
    """An external program (nvcc, ptxas, g++, ...) or Python package is needed but absent."""


class CompileError(PtxError):
    """An external compiler rejected its input."""


class KernelFault(PtxError):
    """A running kernel did something wrong.

    ``kind`` is one of the names in ``launch.FAULT_KINDS``.  ``location`` and ``other_location``
    describe the PTX line and, when line information is available, the source line; ``thread`` and
    ``block`` are (x, y, z) tuples.
    """

    def __init__(self, kind, kernel, message, block, thread, location, other_location, address, size):
        self.kind = kind
        self.kernel = kernel
        self.message = message
        self.block = block
        self.thread = thread
        self.location = location
        self.other_location = other_location
        self.address = address
        self.size = size
        where = f"kernel {kernel}, block {block}, thread {thread}"
        if location:
            where += f", {location.describe()}"
        super().__init__(f"{kind}: {message} [{where}]")
