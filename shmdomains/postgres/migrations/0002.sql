-- Which driver runs the domains of a list, on each host: `DomainList.driver`. A host may have that
-- and no directories.

ALTER TABLE directories ALTER config_dir DROP NOT NULL;
ALTER TABLE directories ADD COLUMN driver text;
