"""libvirt's rules for a list of domains, over any store of records.

`domain_list` and `domain` are the rules (virDomainObjList, virDomainObj): who must hold which lock,
duplicates, live against next definition, persistence; `files` is what they do with config files.
`store` says what they stand on: `ListBase` and `DomainBase`, which shared memory fulfils natively,
and `Store`, over which `plain` fulfils them in Python. `values` checks what goes into a record,
`info` is a domain as it was committed.

Imports the vocabulary, `xml` and `config`; never a store, so the rules import without the core.
"""
