"""The version of the package, read by the build without importing torch, and how pip gets the one installed here."""

import json
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, distribution


__version__ = "0.1.0"


def package() -> str:
    """This package for pip: the commit that it was installed from, if that is on a server, else its version."""
    with suppress(PackageNotFoundError, ValueError, LookupError, TypeError):
        origin = json.loads(distribution("rigpt-hf").read_text("direct_url.json") or "{}")
        if origin["vcs_info"]["vcs"] == "git" and origin["url"].startswith("https://"):
            return f"rigpt-hf @ git+{origin['url']}@{origin['vcs_info']['commit_id']}"
    return f"rigpt-hf=={__version__}"
