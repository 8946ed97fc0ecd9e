//! The lines of a file, plain or gzip, with their places, in bounded memory.

use std::{
    fs::File,
    io::{self, BufRead, BufReader, Read, Seek, SeekFrom},
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use flate2::read::MultiGzDecoder;

/// The longest line. A statement's value has at most 1 MiB.
const LINE_BYTES: u64 = 2 << 20;
const BUFFER_BYTES: usize = 256 << 10;
const GZIP_MAGIC: [u8; 2] = [0x1f, 0x8b];

/// The lines of a file in order.
pub struct Lines {
    path: PathBuf,
    input: Box<dyn BufRead + Send>,
    /// Bytes of the file itself that were read, for a progress bar.
    read: Arc<AtomicU64>,
    len: u64,
    position: u64,
    number: u64,
}

/// A line, and where the next one begins.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Line {
    /// Counted from 1.
    pub number: u64,
    /// Without line feed.
    pub text: Vec<u8>,
    /// The offset of the next line in the text, unpacked.
    pub next: u64,
}

/// Why a file cannot be read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LinesError {
    /// It cannot be opened or read.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A line without end.
    #[error("{}, line {line}: longer than {LINE_BYTES} bytes; is this RDF?", path.display())]
    LineTooLong {
        /// The file.
        path: PathBuf,
        /// Counted from 1.
        line: u64,
    },
    /// It ends before the place to go on from.
    #[error("{} ends before byte {wanted} (line {line}), where the last load stopped; is it the same file?", path.display())]
    TooShort {
        /// The file.
        path: PathBuf,
        /// Where to go on.
        wanted: u64,
        /// Its line.
        line: u64,
    },
}

impl Lines {
    /// Opens a file, gzip or plain by its first bytes.
    ///
    /// # Errors
    /// [`LinesError::Io`].
    pub fn open(path: &Path) -> Result<Self, LinesError> {
        let failed = |source| LinesError::Io { path: path.to_owned(), source };
        let mut file = File::open(path).map_err(failed)?;
        let metadata = file.metadata().map_err(failed)?;
        if metadata.is_dir() {
            return Err(failed(io::Error::new(
                io::ErrorKind::IsADirectory,
                "this is a directory, not a file",
            )));
        }
        let mut magic = Vec::new();
        (&mut file).take(2).read_to_end(&mut magic).map_err(failed)?;
        file.seek(SeekFrom::Start(0)).map_err(failed)?;
        let read = Arc::new(AtomicU64::new(0));
        let counted = Counted { file, read: read.clone() };
        let input: Box<dyn BufRead + Send> = if magic == GZIP_MAGIC {
            Box::new(BufReader::with_capacity(BUFFER_BYTES, MultiGzDecoder::new(counted)))
        } else {
            Box::new(BufReader::with_capacity(BUFFER_BYTES, counted))
        };
        Ok(Lines { path: path.to_owned(), input, read, len: metadata.len(), position: 0, number: 0 })
    }

    /// The size of the file itself.
    pub fn file_bytes(&self) -> u64 {
        self.len
    }

    /// Counts the bytes of the file that were read.
    pub fn progress(&self) -> Arc<AtomicU64> {
        self.read.clone()
    }

    /// Goes to a place that an earlier reading of the same file gave: the offset behind line `number`. A packed file is
    /// unpacked up to there.
    ///
    /// # Errors
    /// [`LinesError::TooShort`] if the text ends before.
    pub fn skip_to(&mut self, position: u64, number: u64) -> Result<(), LinesError> {
        let failed = |source| LinesError::Io { path: self.path.clone(), source };
        let skipped = io::copy(&mut (&mut self.input).take(position - self.position), &mut io::sink())
            .map_err(failed)?;
        if skipped < position - self.position {
            return Err(LinesError::TooShort { path: self.path.clone(), wanted: position, line: number });
        }
        (self.position, self.number) = (position, number);
        Ok(())
    }

    /// The next line, `None` at the end.
    ///
    /// # Errors
    /// [`LinesError::Io`], [`LinesError::LineTooLong`].
    pub fn next_line(&mut self) -> Result<Option<Line>, LinesError> {
        let mut text = Vec::new();
        let count = (&mut self.input)
            .take(LINE_BYTES + 1)
            .read_until(b'\n', &mut text)
            .map_err(|source| LinesError::Io { path: self.path.clone(), source })?;
        if count == 0 {
            return Ok(None);
        }
        self.number += 1;
        self.position += count as u64;
        if count as u64 > LINE_BYTES {
            return Err(LinesError::LineTooLong { path: self.path.clone(), line: self.number });
        }
        if text.last() == Some(&b'\n') {
            text.pop();
        }
        Ok(Some(Line { number: self.number, text, next: self.position }))
    }
}

impl std::fmt::Debug for Lines {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Lines")
            .field("path", &self.path)
            .field("number", &self.number)
            .finish_non_exhaustive()
    }
}

struct Counted {
    file: File,
    read: Arc<AtomicU64>,
}

impl Read for Counted {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.file.read(buffer)?;
        self.read.fetch_add(count as u64, Ordering::Relaxed);
        Ok(count)
    }
}
