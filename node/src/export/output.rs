//! Where the lines of an export go.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, BufWriter, Seek, SeekFrom, Stdout, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};

use flate2::{Compression, write::GzEncoder};

const BUFFER_BYTES: usize = 1 << 20;

/// Takes lines, and gives up those of a predicate that was not written to its end.
pub trait Output: Write + Send {
    /// What was written so far stays.
    ///
    /// # Errors
    /// If it cannot be written.
    fn keep(&mut self) -> io::Result<()>;

    /// Takes back what was written since [`Output::keep`]; false if that cannot be.
    ///
    /// # Errors
    /// If the file fails.
    fn take_back(&mut self) -> io::Result<bool>;
}

impl Output for BufWriter<Stdout> {
    fn keep(&mut self) -> io::Result<()> {
        Ok(())
    }

    fn take_back(&mut self) -> io::Result<bool> {
        Ok(false)
    }
}

/// A new file, packed if its name ends with `.gz`. It has another name, with `.partial` behind, until it is whole, and goes if it does
/// not become so.
///
/// What is kept is a stretch of its own when it is packed: such a file is several packed ones, one after the other, which every reader takes
/// for one.
#[derive(Debug)]
pub struct ExportFile {
    path: PathBuf,
    partial: PathBuf,
    sink: Option<Sink>,
    packed: bool,
    /// Where what is kept ends.
    kept: u64,
}

#[derive(Debug)]
enum Sink {
    Plain(BufWriter<File>),
    Packed(GzEncoder<BufWriter<File>>),
}

impl Sink {
    fn new(file: File, packed: bool) -> Sink {
        let out = BufWriter::with_capacity(BUFFER_BYTES, file);
        match packed {
            true => Sink::Packed(GzEncoder::new(out, Compression::default())),
            false => Sink::Plain(out),
        }
    }

    /// Everything is in the file on return.
    fn into_file(self) -> io::Result<File> {
        let out = match self {
            Sink::Plain(out) => out,
            Sink::Packed(out) => out.finish()?,
        };
        out.into_inner().map_err(io::IntoInnerError::into_error)
    }
}

impl ExportFile {
    /// Begins a file that nobody but its owner reads.
    ///
    /// # Errors
    /// If there is one, or it cannot be made.
    pub fn create(path: &Path) -> io::Result<ExportFile> {
        if path.exists() {
            return Err(io::Error::new(io::ErrorKind::AlreadyExists, "it exists; name a new file"));
        }
        let mut partial = path.as_os_str().to_owned();
        partial.push(".partial");
        let partial = PathBuf::from(partial);
        let file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&partial)?;
        let packed = path.extension().is_some_and(|extension| extension == "gz");
        let sink = Some(Sink::new(file, packed));
        Ok(ExportFile { path: path.to_owned(), partial, sink, packed, kept: 0 })
    }

    /// Gives the file its name. Durable on return.
    ///
    /// # Errors
    /// If it cannot be written; then it is gone.
    pub fn finish(mut self) -> io::Result<()> {
        let Some(sink) = self.sink.take() else { return Err(lost()) };
        sink.into_file()?.sync_all()?;
        fs::rename(&self.partial, &self.path)?;
        let home = self.path.parent().filter(|home| !home.as_os_str().is_empty());
        File::open(home.unwrap_or(Path::new(".")))?.sync_all()
    }

    fn sink(&mut self) -> io::Result<&mut Sink> {
        self.sink.as_mut().ok_or_else(lost)
    }
}

/// An earlier call has failed.
fn lost() -> io::Error {
    io::Error::other("it could not be written before")
}

impl Write for ExportFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self.sink()? {
            Sink::Plain(out) => out.write(bytes),
            Sink::Packed(out) => out.write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        match self.sink()? {
            Sink::Plain(out) => out.flush(),
            Sink::Packed(out) => out.flush(),
        }
    }
}

impl Output for ExportFile {
    fn keep(&mut self) -> io::Result<()> {
        let mut file = self.sink.take().ok_or_else(lost)?.into_file()?;
        self.kept = file.stream_position()?;
        self.sink = Some(Sink::new(file, self.packed));
        Ok(())
    }

    fn take_back(&mut self) -> io::Result<bool> {
        // Whatever waits in buffers is written first, so that it is not written later.
        let mut file = self.sink.take().ok_or_else(lost)?.into_file()?;
        file.set_len(self.kept)?;
        file.seek(SeekFrom::Start(self.kept))?;
        self.sink = Some(Sink::new(file, self.packed));
        Ok(true)
    }
}

impl Drop for ExportFile {
    fn drop(&mut self) {
        // Renamed by now, if it is whole.
        drop(fs::remove_file(&self.partial));
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;

    #[test]
    fn what_is_taken_back_was_never_written() {
        let scratch = tempfile::tempdir().unwrap();
        for name in ["a.nq", "a.nq.gz"] {
            let path = scratch.path().join(name);
            let mut file = ExportFile::create(&path).unwrap();
            file.write_all(b"one\n").unwrap();
            file.keep().unwrap();
            file.write_all(&vec![b'x'; 3 << 20]).unwrap();
            assert!(file.take_back().unwrap());
            file.write_all(b"two\n").unwrap();
            file.keep().unwrap();
            assert!(!path.exists(), "it has no name before it is whole");
            file.finish().unwrap();
            let mut text = String::new();
            let bytes = fs::read(&path).unwrap();
            match name.ends_with("gz") {
                true => flate2::read::MultiGzDecoder::new(&bytes[..]).read_to_string(&mut text).unwrap(),
                false => (&bytes[..]).read_to_string(&mut text).unwrap(),
            };
            assert_eq!(text, "one\ntwo\n");
            assert!(ExportFile::create(&path).is_err(), "it is not written over");
        }
        let given_up = scratch.path().join("b.nq");
        ExportFile::create(&given_up).unwrap().write_all(b"x").unwrap();
        assert_eq!(fs::read_dir(scratch.path()).unwrap().count(), 2, "what is not whole goes");
    }
}
