"""libvirt's rules for a list of domains, over any store of records.

`domain_list` and `domain` are the rules (virDomainObjList, virDomainObj): who must hold which lock,
duplicates, live and next definition, persistence. `files` keeps config files in step with records.
`store` is the protocol below the rules: shared memory implements `ListBase` and `DomainBase`
natively, `plain` implements them in Python over any `Store`. `values` validates the fields of a
record; `info` is the committed state of a domain.

This folder imports the vocabulary, `xml` and `config`, and no store: the rules import without the
core.
"""
