"""Files elsewhere: URLs such as ``s3://bucket/model.qmoe``, through ``fsspec``.

``path`` names and reads them, ``upload`` makes new ones. fsspec, and the package that it needs for
a scheme (s3fs, gcsfs, ...), are imported when there is a URL. Keys, endpoints and how often a
request is repeated are the business of these packages: they have environment variables and
configuration files for that.
"""

from qmoe_format.remote.path import AnyLocation, Location, RemotePath, location

__all__ = ["AnyLocation", "Location", "RemotePath", "location"]
