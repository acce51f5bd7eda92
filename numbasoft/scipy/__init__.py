"""Functions with SciPy's signatures, module for module: change the import line, keep the program."""

from . import special as special
