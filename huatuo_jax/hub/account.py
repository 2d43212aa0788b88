"""Who a token belongs to, and whether it may write to a repository; told before anything is."""

import dataclasses
from collections.abc import Mapping
from typing import Any

_WRITES = "repo.write"
_PROPOSES = "discussion.write"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Account:
    """The owner of a token, as the Hub tells it.

    Attributes:
        name: the user's or organisation's.
        roles: in each organisation of the user: `admin`, `write`, `contributor` or `read`; None
            where the Hub does not tell.
        token_role: `read`, `write` or `fineGrained`; None where the Hub does not tell.
        permissions: of a fine-grained token: what it may do to each owner or repository, by name.
    """

    name: str
    roles: Mapping[str, str | None]
    token_role: str | None
    permissions: Mapping[str, frozenset[str]]

    @classmethod
    def from_whoami(cls, told: Mapping[str, Any]) -> "Account":
        """The account of an answer to `whoami`.

        Raises:
            KeyError, TypeError, AttributeError: it is no such answer.
        """
        token = (told.get("auth") or {}).get("accessToken") or {}
        fine = token.get("fineGrained") or {}
        permissions = {
            str(scope["entity"].get("name", "")).casefold(): frozenset(scope["permissions"])
            for scope in fine.get("scoped") or ()
        }
        organisations = told.get("orgs") or ()
        return cls(
            name=str(told["name"]),
            roles={str(one["name"]): one.get("roleInOrg") for one in organisations},
            token_role=token.get("role"),
            permissions=permissions,
        )

    def owns(self, owner: str) -> bool:
        """Whether an owner of repositories is the user, or an organisation to write for."""
        if owner.casefold() == self.name.casefold():
            return True
        roles = {name.casefold(): role for name, role in self.roles.items()}
        return owner.casefold() in roles and roles[owner.casefold()] != "read"

    def check_may_write(self, repo: str, *, create_pr: bool) -> None:
        """Raises ValueError where the token cannot write to a repository, OWNER/NAME.

        Args:
            repo: the repository.
            create_pr: a pull request is enough, which others' repositories take too.
        """
        owner = repo.partition("/")[0]
        if self.token_role == "read":
            raise ValueError(
                f"the token of {self.name!r} may only read; make one with the right to write at "
                "https://huggingface.co/settings/tokens"
            )
        if not create_pr and not self.owns(owner):
            others = sorted(name for name in self.roles if self.owns(name))
            raise ValueError(
                f"repo={repo!r} is somebody else's: the token of {self.name!r} may write to "
                f"{', '.join([self.name, *others])}; --create_pr proposes a change to another's"
            )
        if self.token_role == "fineGrained":
            wanted = {_WRITES, _PROPOSES} if create_pr else {_WRITES}
            given = self.permissions.get(owner.casefold(), frozenset())
            given |= self.permissions.get(repo.casefold(), frozenset())
            if not wanted & given:
                raise ValueError(
                    f"the fine-grained token of {self.name!r} lacks the permission to write to "
                    f"{repo!r}; add it at https://huggingface.co/settings/tokens"
                )
