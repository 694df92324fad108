use std::{fs::File, sync::Arc, time::Duration};

use blobs::{Address, Blobs};
use proto::template::v1::{
    BuildSource, BuildTemplateRequest, DeleteKernelRequest, ImportKernelRequest, Kernel,
    ListKernelsRequest, build_source::Source, kernel_service_server::KernelService,
    template_service_server::TemplateService,
};
use service_kit::{
    errors::reason_of,
    ids::TeamId,
    mesh::{Caller, MeshToken},
};
use tempfile::TempDir;
use template_svc::{
    api::{KernelApi, TemplateApi},
    artifact::{ArtifactDigest, Artifacts},
    kernel::Importer,
    quota::Quota,
    secrets::Sealer,
    store::Store,
    uploads::Uploads,
};
use testbed::{Durability, Postgres};
use tokio::sync::Notify;
use tonic::{Code, Request, Status};

use crate::{
    fresh,
    made::{self, RELEASE},
};

struct World {
    store: Store,
    uploads: Uploads,
    artifacts: Artifacts,
    kernels: KernelApi,
    templates: TemplateApi,
    folder: TempDir,
    _postgres: Postgres,
}

impl World {
    async fn new() -> Self {
        let postgres = Postgres::with(Durability::None).unwrap();
        let store = fresh::store(&postgres).await;
        let folder = tempfile::tempdir().unwrap();
        let uploads = Uploads::open(folder.path().join("uploads"), 1 << 20, 1 << 30).unwrap();
        let artifacts = Artifacts::open(folder.path().join("artifacts")).unwrap();
        let importer = Importer {
            uploads: uploads.clone(),
            artifacts: artifacts.clone(),
        };
        let templates = TemplateApi::new(
            store.clone(),
            Blobs::open(&Address::of_folder(&folder.path().join("store")).unwrap()).unwrap(),
            Sealer::new(MeshToken::random()),
            uploads.clone(),
            Quota::new(store.clone(), 1 << 30, Duration::ZERO),
            Arc::new(Notify::new()),
        );
        Self {
            kernels: KernelApi::new(store.clone(), importer),
            store,
            uploads,
            artifacts,
            templates,
            folder,
            _postgres: postgres,
        }
    }

    fn upload(&self, bytes: &[u8]) -> String {
        let uploads = self.uploads.of(&team()).unwrap();
        uploads.ingest_from(bytes).unwrap().digest
    }

    fn is_kept(&self, digest: &str) -> bool {
        let digest = ArtifactDigest::parse(digest).unwrap();
        self.artifacts.find(&digest).is_some()
    }

    async fn import(&self, request: ImportKernelRequest) -> Result<Kernel, Status> {
        let answer = self.kernels.import_kernel(by_operator(request)).await?;
        Ok(answer.into_inner().kernel.unwrap())
    }

    async fn list(&self) -> Vec<Kernel> {
        let answer = self
            .kernels
            .list_kernels(by_operator(ListKernelsRequest {}));
        answer.await.unwrap().into_inner().kernels
    }

    async fn delete(&self, name: &str) -> Result<(), Status> {
        let request = DeleteKernelRequest { name: name.into() };
        let answer = self.kernels.delete_kernel(by_operator(request)).await;
        answer.map(drop)
    }

    async fn build(&self, kernel: &str, arguments: &str) -> Result<BuildTemplateRequest, Status> {
        let request = BuildTemplateRequest {
            name: "app".into(),
            source: Some(BuildSource {
                source: Some(Source::OciImage("debian".into())),
            }),
            kernel: kernel.into(),
            kernel_arguments: arguments.into(),
            ..BuildTemplateRequest::default()
        };
        let answer = self.templates.build_template(by_team(request)).await?;
        let id = answer.into_inner().build.unwrap().build_id;
        Ok(self.store.build(&id).await.unwrap().unwrap().request)
    }
}

fn team() -> TeamId {
    TeamId::parse("team").unwrap()
}

fn by<T>(message: T, operator: bool) -> Request<T> {
    let mut request = Request::new(message);
    let caller = Caller {
        team: team(),
        key_id: String::new(),
        operator,
    };
    caller.apply(request.metadata_mut());
    request
}

fn by_operator<T>(message: T) -> Request<T> {
    by(message, true)
}

fn by_team<T>(message: T) -> Request<T> {
    by(message, false)
}

fn archive(release: &str) -> Vec<u8> {
    use std::io::Write as _;
    let folder = cpio::newc::Builder::new("modules").mode(0o040_755);
    let archive = folder.write(Vec::new(), 0).finish().unwrap();
    let module = made::module(release);
    let entry = cpio::newc::Builder::new("modules/00-erofs.ko").mode(0o100_644);
    let mut entry = entry.write(archive, u32::try_from(module.len()).unwrap());
    entry.write_all(&module).unwrap();
    cpio::newc::trailer(entry.finish().unwrap()).unwrap()
}

fn said(error: &Status) -> (Code, String) {
    (error.code(), reason_of(error).unwrap_or_default())
}

#[tokio::test]
async fn a_kernel_has_a_name_until_it_is_deleted() {
    let world = World::new().await;
    let kernel = world.upload(&made::Kernel::default().make());
    let modules = world.upload(&archive(RELEASE));
    let request = |name: &str, version: &str| ImportKernelRequest {
        name: name.into(),
        kernel: kernel.clone(),
        modules: modules.clone(),
        version: version.into(),
    };
    let own = world.import(request("own", "")).await.unwrap();
    assert_eq!((own.name.as_str(), own.version.as_str()), ("own", RELEASE));
    assert_eq!(own.architecture, "x86_64");
    assert_eq!(own.kernel.as_ref().unwrap().digest, kernel);
    assert_eq!(own.modules.as_ref().unwrap().digest, modules);
    assert!(world.is_kept(&kernel) && world.is_kept(&modules));
    world.import(request("a", "1")).await.unwrap();

    // Under the same name builds have another from now on.
    let other = made::Kernel {
        text: "Linux version 7.0 (me)".into(),
        ..made::Kernel::default()
    };
    let other = ImportKernelRequest {
        kernel: world.upload(&other.make()),
        modules: world.upload(&archive("7.0")),
        ..request("own", "")
    };
    let replaced = world.import(other.clone()).await.unwrap();
    assert_eq!(replaced.version, "7.0");
    let listed = world.list().await;
    let listed: Vec<_> = listed.iter().map(|it| (&*it.name, &*it.version)).collect();
    assert_eq!(listed, [("a", "1"), ("own", "7.0")]);
    let found = world.store.kernel("own").await.unwrap().unwrap();
    assert_eq!(found.kernel.unwrap().digest, other.kernel);
    let wanted = world.store.digests().await.unwrap();
    assert!(wanted.contains(&other.kernel) && wanted.contains(&other.modules));

    world.delete("own").await.unwrap();
    assert_eq!(world.list().await.len(), 1);
    assert!(!world.store.digests().await.unwrap().contains(&other.kernel));
    let again = world.delete("own").await.unwrap_err();
    assert_eq!(said(&again), (Code::NotFound, "KERNEL_UNKNOWN".into()));
}

#[tokio::test]
async fn kernels_are_for_operators() {
    let world = World::new().await;
    let import = world
        .kernels
        .import_kernel(by_team(ImportKernelRequest::default()));
    let list = world.kernels.list_kernels(by_team(ListKernelsRequest {}));
    let delete = world
        .kernels
        .delete_kernel(by_team(DeleteKernelRequest::default()));
    for error in [
        import.await.map(drop).unwrap_err(),
        list.await.map(drop).unwrap_err(),
        delete.await.map(drop).unwrap_err(),
    ] {
        assert_eq!(said(&error), (Code::PermissionDenied, "NOT_ALLOWED".into()));
    }
}

/// Whatever whoever imports it has looked at.
#[tokio::test]
async fn what_guests_cannot_boot_is_refused() {
    let world = World::new().await;
    let kernel = made::Kernel::default().make();
    let image = made::bzimage(&made::gzip(&kernel));
    let archive_of = |release| archive(release);
    let good = ImportKernelRequest {
        name: "own".into(),
        kernel: world.upload(&kernel),
        modules: world.upload(&archive_of(RELEASE)),
        version: String::new(),
    };
    let like = || good.clone();
    let large = "f".repeat(64);
    let file = File::create(world.folder.path().join("uploads/team").join(&large)).unwrap();
    file.set_len((256 << 20) + 1).unwrap();
    let cases = [
        (
            ImportKernelRequest {
                name: "A b".into(),
                ..like()
            },
            "INVALID_ARGUMENT",
        ),
        (
            ImportKernelRequest {
                name: String::new(),
                ..like()
            },
            "INVALID_ARGUMENT",
        ),
        (
            ImportKernelRequest {
                version: "x".repeat(129),
                ..like()
            },
            "INVALID_ARGUMENT",
        ),
        (
            ImportKernelRequest {
                version: "a\nb".into(),
                ..like()
            },
            "INVALID_ARGUMENT",
        ),
        (
            ImportKernelRequest {
                kernel: "0".repeat(64),
                ..like()
            },
            "SOURCE_UNKNOWN",
        ),
        (
            ImportKernelRequest {
                modules: "../x".into(),
                ..like()
            },
            "SOURCE_UNKNOWN",
        ),
        (
            ImportKernelRequest {
                kernel: world.upload(&image),
                ..like()
            },
            "KERNEL_INVALID",
        ),
        (
            ImportKernelRequest {
                kernel: world.upload(b""),
                ..like()
            },
            "KERNEL_INVALID",
        ),
        (
            ImportKernelRequest {
                modules: world.upload(b""),
                ..like()
            },
            "KERNEL_INVALID",
        ),
        (
            ImportKernelRequest {
                modules: world.upload(&archive_of("7.0")),
                ..like()
            },
            "KERNEL_INVALID",
        ),
        (
            ImportKernelRequest {
                kernel: large.clone(),
                ..like()
            },
            "SOURCE_TOO_LARGE",
        ),
        (
            ImportKernelRequest {
                modules: large,
                ..like()
            },
            "SOURCE_TOO_LARGE",
        ),
    ];
    for (request, reason) in cases {
        let error = world.import(request.clone()).await.unwrap_err();
        assert_eq!(said(&error).1, reason, "{request:?}: {error}");
    }
    assert!(world.list().await.is_empty());
    world.import(good).await.unwrap();
}

#[tokio::test]
async fn builds_name_kernels_and_what_these_are_told() {
    let world = World::new().await;
    let request = ImportKernelRequest {
        name: "hardened".into(),
        kernel: world.upload(&made::Kernel::default().make()),
        modules: world.upload(&archive(RELEASE)),
        version: String::new(),
    };
    world.import(request).await.unwrap();
    let asked = world
        .build("hardened", " mitigations=off   a.b=1")
        .await
        .unwrap();
    assert_eq!(
        (&*asked.kernel, &*asked.kernel_arguments),
        ("hardened", "mitigations=off a.b=1")
    );
    let error = world.build("hardend", "").await.unwrap_err();
    assert_eq!(said(&error), (Code::NotFound, "KERNEL_UNKNOWN".into()));
    assert!(error.message().contains("hardened"), "{error}");
    for arguments in ["root=/dev/vda", "a\nb", &"x".repeat(513), "quiet -- x"] {
        let error = world.build("", arguments).await.unwrap_err();
        assert_eq!(said(&error).1, "INVALID_ARGUMENT");
        assert!(error.message().contains("kernel_arguments"), "{error}");
    }
    // Nothing that is refused waits to be built.
    let lease = Duration::from_mins(1);
    assert!(world.store.take_build(lease, 9).await.unwrap().is_some());
    assert!(world.store.take_build(lease, 9).await.unwrap().is_none());
}
