"""What the jaxtyping hook checks every annotation of the package with; an int is a float, as for type checkers."""

import functools

from beartype import BeartypeConf, beartype

check = functools.partial(beartype, conf=BeartypeConf(is_pep484_tower=True))
