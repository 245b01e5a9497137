"""libvirt's domain XML, and the immutable, typed value that it is here.

`document` is text and lxml, `devices` the devices, `definition` the whole. This folder imports the
vocabulary only. It promises that hostile text is refused with a `DefinitionError`, and that what it
does not understand survives.
"""
