"""The second store: one list of domains for more than one host, in a PostgreSQL database.

`domain_list` has the list, `store` what it asks the server, ``migrations/0001.sql`` what the server
does. Needs psycopg 3: ``pip install 'shmdomains[postgres]'``.
"""

try:
    import psycopg as _psycopg
except ImportError as _exc:
    raise ImportError(
        "a list on PostgreSQL needs psycopg: pip install 'shmdomains[postgres]'"
    ) from _exc

from .domain_list import PostgresDomain, PostgresDomainList

__all__ = ["PostgresDomain", "PostgresDomainList"]
