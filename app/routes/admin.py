"""POST /admin/reload. It exists only if a key is set."""

import hmac
from typing import Annotated

from fastapi import APIRouter, Depends
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from app.errors import Unauthorized
from app.routes import ServiceDep
from app.routes.answers import model_info
from app.schemas import ModelInfo, Reloaded, error_responses

bearer = HTTPBearer(auto_error=False, description="The key given to the service as CIFAR_ADMIN_KEY.")


async def _check_key(
    service: ServiceDep, given: Annotated[HTTPAuthorizationCredentials | None, Depends(bearer)]
) -> None:
    assert service.settings.admin_key is not None
    key = given.credentials.encode() if given else b""
    if not hmac.compare_digest(key, service.settings.admin_key.encode()):
        raise Unauthorized(
            "The key is missing or wrong. Send the header `Authorization: Bearer KEY`.",
            headers={"WWW-Authenticate": "Bearer"},
        )


router = APIRouter(prefix="/admin", tags=["administration"], dependencies=[Depends(_check_key)])


@router.post(
    "/reload",
    summary="Read the weights file again and serve it",
    response_description="The weights in the file are being served.",
    responses=error_responses(401, 409, 500, 503),
)
async def reload(service: ServiceDep) -> Reloaded:
    """The same as the signal SIGHUP. The file is read, checked and warmed up while the old weights answer requests;
    each answer says which weights it came from. A file that cannot be used, or is for other classes, changes nothing.
    Other processes serving here follow once this one has replaced its weights. Send the key as
    `Authorization: Bearer KEY`."""
    changed = await service.reload()
    return Reloaded(model=ModelInfo(**model_info(service.checkpoint)), changed=changed)
