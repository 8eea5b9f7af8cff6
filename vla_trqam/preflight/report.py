"""What a preflight found, as a table and as one error that lists everything that is wrong."""

from __future__ import annotations

from dataclasses import dataclass

from vla_trqam.errors import UserError


@dataclass(frozen=True)
class Finding:
    """The outcome of one check.

    Attributes:
        name: of the check.
        found: what is there, in numbers.
        ok: whether training can work with it.
        remedy: what would be right, where it cannot.
    """

    name: str
    found: str
    ok: bool = True
    remedy: str = ""

    @classmethod
    def failure(cls, name: str, found: str, remedy: str) -> Finding:
        """Of a check that stops the run."""
        return cls(name, found, ok=False, remedy=remedy)


@dataclass(frozen=True)
class PreflightReport:
    """All findings in order.

    Attributes:
        findings: of the checks that ran.
        not_run: names of the checks that need what others found missing.
    """

    findings: tuple[Finding, ...]
    not_run: tuple[str, ...] = ()

    @property
    def failures(self) -> tuple[Finding, ...]:
        """The findings that stop the run."""
        return tuple(finding for finding in self.findings if not finding.ok)

    def lines(self) -> list[str]:
        """A table: verdict, check, what was found; a remedy below each failure."""
        width = max(map(len, [*(f.name for f in self.findings), *self.not_run]), default=0)
        table = []
        for finding in self.findings:
            verdict = "ok" if finding.ok else "FAIL"
            table.append(f"{verdict:<4}  {finding.name:<{width}}  {finding.found}")
            if not finding.ok:
                table.append(f"      {'':<{width}}  -> {finding.remedy}")
        table += [f"-     {name:<{width}}  not run: it needs the above" for name in self.not_run]
        return table

    def raise_on_failure(self) -> None:
        """Stop if anything failed.

        Raises:
            UserError: all failures, a line each, with what would be right.
        """
        if not self.failures:
            return
        said = [f"- {f.name}: {f.found}. Right would be: {f.remedy}" for f in self.failures]
        count = "one thing" if len(said) == 1 else f"{len(said)} things"
        raise UserError(f"training cannot work, {count} to change first:\n" + "\n".join(said))
