-- Sealed by template-svc; null once the build has ended.
alter table builds add column secrets bytea;
