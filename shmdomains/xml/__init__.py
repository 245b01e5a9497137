"""libvirt's domain XML as an immutable, typed value.

`document` is text and lxml, `devices` the devices, `definition` the whole. This folder imports the
vocabulary only. It promises that hostile text is refused with a `DefinitionError`, and that unknown
parts of a document survive.
"""
