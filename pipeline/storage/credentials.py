"""Credentials of S3 out of the files in which users keep them: obstore itself reads the environment alone."""

from __future__ import annotations

import os
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from pipeline.errors import InputError, OpenError

_GIVEN = {"access_key_id", "skip_signature", "web_identity_token_file", "container_credentials_relative_uri"}
"""Options that say who asks."""
_VARIABLES = (
    "AWS_ACCESS_KEY_ID",
    "AWS_SKIP_SIGNATURE",
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
)
"""The same in the environment, which obstore reads."""
_LIFETIME = timedelta(minutes=10)
"""How long obstore keeps what it was given, before it asks again; botocore renews what expires."""


class ProfileCredentials:
    """Gives obstore the keys of a profile, anew before they expire; its text tells none."""

    def __init__(self, credentials: Any) -> None:
        self._credentials = credentials

    def __call__(self) -> dict[str, Any]:
        """See `obstore.store.S3CredentialProvider`."""
        keys = self._credentials.get_frozen_credentials()
        return {
            "access_key_id": keys.access_key,
            "secret_access_key": keys.secret_key,
            "token": keys.token,
            "expires_at": datetime.now(UTC) + _LIFETIME,
        }


def profile_options(options: dict[str, Any], name: str) -> dict[str, Any]:
    """Return options of an S3 store, completed by those of `~/.aws`: credentials, region, endpoint.

    What is given, or in the environment, comes first. `profile` among them names the profile; else `AWS_PROFILE` does.

    Parameters
    ----------
    name
        Of what is opened, for messages.

    Raises
    ------
    InputError
        If there is no such profile.
    OpenError
        If the files cannot be read, or botocore, which reads them, is not installed.
    """
    options = dict(options)
    profile = options.pop("profile", None)
    named = profile or os.environ.get("AWS_PROFILE") or os.environ.get("AWS_DEFAULT_PROFILE")
    secrets = _file("AWS_SHARED_CREDENTIALS_FILE", "credentials")
    if not (named or secrets.is_file() or _file("AWS_CONFIG_FILE", "config").is_file()):
        return options
    given = {key.lower().removeprefix("aws_") for key in options}
    known = "credential_provider" in given or not _GIVEN.isdisjoint(given)
    known = known or (profile is None and any(variable in os.environ for variable in _VARIABLES))
    try:
        import botocore.session
        from botocore.exceptions import BotoCoreError, ProfileNotFound
    except ImportError as error:
        if known or not (named or secrets.is_file()):
            return options
        raise OpenError(
            f"credentials are those of a profile; {name} needs botocore to read {secrets.parent}; pip install botocore"
        ) from error
    try:
        return _of_session(botocore.session.Session(profile=profile), given, known=known) | options
    except ProfileNotFound as error:
        raise InputError(
            f"a profile is one of {secrets.parent}; {name} is to be read with {named!r}, which is not there; check "
            "AWS_PROFILE"
        ) from error
    except BotoCoreError as error:
        raise OpenError(f"a profile can be read; that for {name} cannot: {type(error).__name__}; mend it") from error


def _of_session(session: Any, given: set[str], *, known: bool) -> dict[str, Any]:
    """Return what a session of botocore tells beside the options that are `given`; `known`: who asks is among them."""
    from botocore.configprovider import ConfiguredEndpointProvider

    found: dict[str, Any] = {}
    # First, since it refuses a profile that is not there.
    scoped = session.get_scoped_config()
    if not known:
        resolver = session.get_component("credential_provider")
        # Of those that ask a service of the machine, obstore has its own, which hurry.
        for method in ("container-role", "iam-role"):
            resolver.remove(method)
        if credentials := session.get_credentials():
            found["credential_provider"] = ProfileCredentials(credentials)
    if not ({"region", "default_region"} & given or os.environ.get("AWS_REGION")) and (
        region := session.get_config_variable("region")
    ):
        found["region"] = region
    if not {"endpoint", "endpoint_url", "endpoint_url_s3"} & given and (
        endpoint := ConfiguredEndpointProvider(session.full_config, scoped, "s3").provide()
    ):
        found["endpoint"] = endpoint
    return found


def _file(variable: str, name: str) -> Path:
    given = os.environ.get(variable)
    return Path(given).expanduser() if given else Path.home() / ".aws" / name
