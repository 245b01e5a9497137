"""The second store: one list of domains for more than one host, in a PostgreSQL database.

`domain_list` has the list, `store` what it asks the server, ``migrations/0001.sql`` what the server
does. Needs psycopg 3: ``pip install 'shmdomains[postgres]'``.
"""

import importlib.util

if importlib.util.find_spec("psycopg") is None:
    raise ImportError("a list on PostgreSQL needs psycopg: pip install 'shmdomains[postgres]'")

from .domain import PostgresDomain
from .domain_list import PostgresDomainList

__all__ = ["PostgresDomain", "PostgresDomainList"]
